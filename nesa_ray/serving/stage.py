"""The worker of one of a decoder's stages: computes its part of a step and passes it on; the last one samples."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nesa_ray.graph.split import Instruction, StageModule, StageProgram
from nesa_ray.runtime.adapter_files import Adapter
from nesa_ray.runtime.channel import Channel, Kind, Tag
from nesa_ray.serving.adapters import ADAPTERS, Site, StageAdapters, adapt
from nesa_ray.serving.choices import CHOSEN, Choices
from nesa_ray.serving.fusion import compute_once, fold_constants, fuse
from nesa_ray.serving.kv_cache import HeadShape
from nesa_ray.serving.native.attention import NativeContext, bind, context_for
from nesa_ray.serving.native.chains import CHAINS
from nesa_ray.serving.native.helpers import Helpers
from nesa_ray.serving.packing import grouped_products, pack
from nesa_ray.serving.pages import settle
from nesa_ray.serving.pooling import Pooler
from nesa_ray.serving.quantised import bind_product, quantise_products
from nesa_ray.serving.rows import ROWS
from nesa_ray.serving.sampling import Sampler
from nesa_ray.serving.segments import SEGMENT, Segment, divide, gather
from nesa_ray.serving.step import Step
from nesa_ray.serving.worker import ENGINE, StageWeights, Worker, from_bytes

ADMISSIONS, TOKENS, VECTORS = "admissions", "tokens", "vectors"


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """All that a stage's worker needs; plain data, so it travels.

    program, tokens, positions, logits, hidden   see rows.Served
    readers     the stages that read tokens
    weights     where its state comes from
    attention   attention node -> its shape
    adapters    in the order of their numbers, of which the first is 1
    adapted     instruction -> the layer of the adapters that add to it
    quantised   whether products are with int8 weights (quantised.py)
    lent        cores of other stages on its host, for steps that are alone
    """

    program: StageProgram
    tokens: str
    positions: str
    logits: str
    hidden: str | None
    readers: tuple[int, ...]
    weights: StageWeights
    attention: Mapping[str, HeadShape]
    adapters: tuple[Adapter, ...]
    adapted: Mapping[str, Site]
    dtype: torch.dtype
    quantised: bool
    block_size: int
    blocks: int
    vocabulary: int
    lent: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether this stage makes the logits."""
        return self.logits in self.program.results

    def worker(self, channel: Channel, peers: Mapping[int, str], device: torch.device | str = "cpu") -> StageWorker:
        """See worker.Spec."""
        return StageWorker(channel, self, peers, device)


class StageWorker(Worker):
    """Holds a stage's weights and cache."""

    def __init__(
        self, channel: Channel, spec: StageSpec, peers: Mapping[int, str], device: torch.device | str = "cpu"
    ) -> None:
        """Loads the weights: only this stage's own tensors are read.  Raises CheckpointError.

        `peers` has each stage's name on the channel.
        """
        super().__init__(channel, spec.program.id)
        self.spec, self._peers, self._device = spec, peers, torch.device(device)
        self._context = context_for(spec.block_size, spec.dtype, self._device)
        self._adapters = StageAdapters(spec.adapters, spec.adapted, spec.dtype, self._device)
        program = adapt(spec.program, spec.adapted)
        if spec.quantised:
            program, state = self._quantised(program)
        else:
            state = spec.weights.load(spec.program.state, self._device)
        program, state = fold_constants(program, state)
        if isinstance(self._context, NativeContext):
            program = fuse(program, state, spec.dtype)
        program, state = pack(compute_once(program), state, spec.dtype, self._device)
        state = settle(state)
        before, program = divide(program, {spec.tokens, *program.receives})
        segments: dict[str, Segment] = {}
        if isinstance(self._context, NativeContext):
            program, parts = gather(program)
            segments = {n: Segment(part, state, self._bind, self._context) for n, part in parts.items()}

        def bind(node: Instruction) -> Any:
            return segments[node.name] if node.target == SEGMENT else self._bind(node)

        self._before, self._module = (
            StageModule(p, state, device=self._device, attention=bind).requires_grad_(False) for p in (before, program)
        )
        self._choices = Choices(channel) if spec.program.id in spec.readers else None
        self._sampler, self._pooler = Sampler(spec.vocabulary), Pooler()
        self._helpers = Helpers(spec.lent if torch.get_num_threads() == 1 else ())

    def _quantised(self, program: StageProgram) -> tuple[StageProgram, dict[str, torch.Tensor]]:
        """A tensor is read from its file when it is quantised, and not kept.

        Those of experts often lie there in pieces, and would all be in memory otherwise.
        """
        spec, weights = self.spec, self.spec.weights
        later = {p.weight for p in grouped_products(program, spec.program.state)}
        now = weights.load([n for n in spec.program.state if n not in weights.values and n not in later], self._device)

        def read(name: str) -> torch.Tensor:
            return weights.load([name], self._device)[name]

        program, state = quantise_products(program, now, spec.dtype, read)
        return program, {**state, **{n: t.to(self._device) for n, t in weights.values.items()}}

    def _bind(self, node: Instruction) -> Any:
        if node.target == ADAPTERS:
            return self._adapters.bind(node.name)
        if node.target in CHAINS:
            return CHAINS[node.target](self.spec.dtype)
        product = bind_product(node.target, self.spec.dtype, native=isinstance(self._context, NativeContext))
        if product is not None:
            return product
        shape = self.spec.attention[node.name]
        return bind(node.name, shape, self.spec.blocks, self._context, self.spec.dtype, self._device)

    def _compute(self, index: int, message: torch.Tensor) -> None:
        spec = self.spec
        with self._working():  # while what the step waits for is on its way
            step = Step.unpack(message)
            self._context.set(step)
            self._adapters.set(step)
            values = {spec.positions: step.positions_T[None].to(self._device), ROWS: step.rows_R.to(self._device)}
            self._evaluate(self._before, values)
            slots = step.slots_S.tolist()
            if spec.samples:
                self._admit(index)
        if self._choices is not None:
            values[spec.tokens] = self._choices.tokens(index, step)[None].to(self._device)
        for name in spec.program.receives:
            value = self._channel.recv(Tag(Kind.FORWARD, name, index))
            assert value is not None
            values[name] = value.to(self._device)
        with self._working():
            with self._helpers if step.alone else contextlib.nullcontext():
                self._evaluate(self._module, values)
            for name, stages in spec.program.sends.items():
                for stage in stages:
                    self._channel.send(self._peers[stage], Tag(Kind.FORWARD, name, index), values[name])
            if spec.samples:
                self._sample(index, values[spec.logits][0], slots)
                if spec.hidden is not None and len(step.slots_P):
                    self._pool(index, values[spec.hidden][0], step)

    def _evaluate(self, module: StageModule, values: dict[str, torch.Tensor]) -> None:
        """Adds to the values what the module makes of them."""
        program = module.program
        values.update(zip(program.returns, module(*(values[n] for n in program.arguments)), strict=True))

    def _admit(self, index: int) -> None:
        """What the engine tells of new requests comes before their first step, on the same connection."""
        tag = Tag(Kind.CONTROL, ADMISSIONS, index)
        if not self._channel.has(tag):
            return
        told = self._channel.recv(tag)
        assert told is not None
        for admission in json.loads(from_bytes(told)):
            self._sampler.admit(admission)
            self._pooler.admit(admission["slot"])

    def _sample(self, index: int, logits_RV: torch.Tensor, slots: list[int]) -> None:
        result = self._sampler.choose(logits_RV[: len(slots)].cpu(), slots)
        if slots:
            for stage in self.spec.readers:
                self._channel.send(self._peers[stage], Tag(Kind.CONTROL, CHOSEN, index), result)
        self._channel.send(ENGINE, Tag(Kind.CONTROL, TOKENS, index), result)

    def _pool(self, index: int, hidden_RD: torch.Tensor, step: Step) -> None:
        self._pooler.add(hidden_RD[len(step.slots_S) :], step.slots_P)
        if len(step.slots_E):
            self._channel.send(ENGINE, Tag(Kind.CONTROL, VECTORS, index), self._pooler.take(step.slots_E))
