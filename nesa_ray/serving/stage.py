"""The worker of one stage: waits for a step, computes its part, passes it on; the last one samples.

A stage gets the step's metadata from the engine and activations from the stages before, all under the step's index, so
it needs no other coordination: steps are computed in the order in which the engine numbered them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nesa_ray.errors import RuntimeFailure
from nesa_ray.graph.split import Instruction, StageModule, StageProgram
from nesa_ray.runtime.channel import Channel, Kind, Tag
from nesa_ray.runtime.checkpoint import load_state
from nesa_ray.serving.fusion import fold_constants, fuse
from nesa_ray.serving.kv_cache import HeadShape
from nesa_ray.serving.native.attention import bind, context_for
from nesa_ray.serving.native.chains import CHAINS
from nesa_ray.serving.native.products import Int8Product
from nesa_ray.serving.packing import can_pack, pack
from nesa_ray.serving.pooling import Pooler
from nesa_ray.serving.quantised import PRODUCT, int8_product, quantise_products
from nesa_ray.serving.rows import ROWS
from nesa_ray.serving.sampling import Sampler
from nesa_ray.serving.step import Step

ENGINE = "engine"
STEP, ADMISSIONS, TOKENS, VECTORS, FAILED = "step", "admissions", "tokens", "vectors", "failed"


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """All that a stage's worker needs; plain data, so it travels.

    program, tokens, positions, logits, hidden   see rows.Served
    attention   attention node -> its shape
    constants   buffers that no checkpoint has (rotary frequencies)
    aliases     other names that a checkpoint may have for a parameter
    weights     as in ServeConfig
    """

    program: StageProgram
    tokens: str
    positions: str
    logits: str
    hidden: str | None
    directory: str
    aliases: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, torch.Tensor]
    attention: Mapping[str, HeadShape]
    dtype: torch.dtype
    weights: str
    block_size: int
    blocks: int
    vocabulary: int

    @property
    def samples(self) -> bool:
        """Whether this stage makes the logits."""
        return self.logits in self.program.results


class StageWorker:
    """Holds a stage's weights and cache, and computes its part of every step on a thread of its own."""

    def __init__(
        self, channel: Channel, spec: StageSpec, peers: Mapping[int, str], device: torch.device | str = "cpu"
    ) -> None:
        """Loads the weights: only this stage's own tensors are read.  Raises CheckpointError.

        `peers` has each stage's name on the channel.
        """
        self.spec, self._channel, self._peers, self._device = spec, channel, peers, torch.device(device)
        self._context = context_for(spec.block_size, spec.dtype, self._device)
        program = spec.program
        names = [n for n in program.state if n not in spec.constants]
        if spec.weights == "int8":  # as the files have them: a tensor is read when it is quantised, and not kept
            state = load_state(spec.directory, names, aliases=spec.aliases)
            program, state = quantise_products(program, state, spec.dtype)
        else:
            state = load_state(spec.directory, names, aliases=spec.aliases, dtype=spec.dtype)
        state = {n: t.to(self._device) for n, t in {**state, **spec.constants}.items()}
        program, state = fold_constants(program, state)
        if self._context.native:
            program = fuse(program, state, spec.dtype)
        if can_pack(spec.dtype, self._device):
            program, state = pack(program, state)
        self._module = StageModule(program, state, device=self._device, attention=self._bind).requires_grad_(False)
        self._sampler, self._pooler = Sampler(spec.vocabulary), Pooler()
        self._steps, self._busy_s, self._cpu_s, self._started = 0, 0.0, 0.0, time.monotonic()
        self._thread: threading.Thread | None = None

    def _bind(self, node: Instruction) -> Any:
        if node.target in CHAINS:
            return CHAINS[node.target](self.spec.dtype)
        if node.target == PRODUCT:
            return Int8Product(self.spec.dtype) if self._context.native else int8_product
        shape = self.spec.attention[node.name]
        return bind(node.name, shape, self.spec.blocks, self._context, self.spec.dtype, self._device)

    def start(self) -> None:
        """Begins to serve steps."""
        self._thread = threading.Thread(target=self._run, name=f"stage-{self.spec.program.id}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits until the worker has ended, as the engine asks by a step without a message; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def stats(self) -> dict[str, float]:
        """Steps computed, seconds spent on them by the clock and by the worker's thread, seconds since the start."""
        alive_s = time.monotonic() - self._started
        return {"steps": self._steps, "busy_s": self._busy_s, "cpu_s": self._cpu_s, "alive_s": alive_s}

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                for index in itertools.count():
                    message = self._channel.recv(Tag(Kind.CONTROL, STEP, index))
                    if message is None:
                        return
                    self._compute(index, Step.unpack(message))
        except Exception as e:
            said = str(e) if isinstance(e, RuntimeFailure) else f"{type(e).__name__}: {e}"
            text = f"stage {self.spec.program.id}: {said}\n{traceback.format_exc()}"
            with contextlib.suppress(Exception):  # the engine may be what was lost, or have closed
                self._channel.send(ENGINE, Tag(Kind.CONTROL, FAILED, 0), as_bytes(text))

    def _compute(self, index: int, step: Step) -> None:
        spec, program = self.spec, self.spec.program
        rows_R = step.rows_R if len(step.rows_R) else step.rows_R.new_zeros(1)  # operators refuse to have none
        given = {spec.tokens: step.tokens_T[None], spec.positions: step.positions_T[None], ROWS: rows_R}
        inputs = [given[n].to(self._device) for n in program.inputs]
        for name in program.receives:
            value = self._channel.recv(Tag(Kind.FORWARD, name, index))
            assert value is not None
            inputs.append(value.to(self._device))
        began, cpu_began = time.perf_counter(), time.thread_time()
        self._context.set(step)
        values = dict(zip(program.returns, self._module(*inputs), strict=True))
        for name, stages in program.sends.items():
            for stage in stages:
                self._channel.send(self._peers[stage], Tag(Kind.FORWARD, name, index), values[name])
        if spec.samples:
            self._admit(index)
            self._sample(index, values[spec.logits][0], step)
            if spec.hidden is not None and len(step.slots_P):
                self._pool(index, values[spec.hidden][0], step)
        self._busy_s += time.perf_counter() - began
        self._cpu_s += time.thread_time() - cpu_began
        self._steps += 1

    def _admit(self, index: int) -> None:
        admissions = self._channel.recv(Tag(Kind.CONTROL, ADMISSIONS, index))
        if admissions is not None:
            for admission in json.loads(from_bytes(admissions)):
                self._sampler.admit(admission)
                self._pooler.admit(admission["slot"])

    def _sample(self, index: int, logits_RV: torch.Tensor, step: Step) -> None:
        result = self._sampler.choose(logits_RV[: len(step.slots_S)].cpu(), step.slots_S.tolist())
        self._channel.send(ENGINE, Tag(Kind.CONTROL, TOKENS, index), result)

    def _pool(self, index: int, hidden_RD: torch.Tensor, step: Step) -> None:
        self._pooler.add(hidden_RD[len(step.slots_S) :], step.slots_P)
        if len(step.slots_E):
            self._channel.send(ENGINE, Tag(Kind.CONTROL, VECTORS, index), self._pooler.take(step.slots_E))


def as_bytes(text: str) -> torch.Tensor:
    """Text as a message."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def from_bytes(message: torch.Tensor) -> str:
    """The text of a message."""
    return message.numpy().tobytes().decode()
