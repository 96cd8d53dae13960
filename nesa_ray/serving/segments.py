"""Runs of instructions that are kernels' work -> one instruction each, which plays them as one call (native/tape.py).

A decoder's layers become one segment, between the positions' cosines before them and the choice of rows behind them.
A segment first runs its instructions as they are, and records some runs; from then on it plays them, or where they
can't be played (see NotPlayable), goes on as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch

from nesa_ray.graph.split import ATTENTION, STATE, Instruction, Ref, StageModule, StageProgram
from nesa_ray.serving.fusion import ADD, GATE, NORM, ROTATION, TAKE
from nesa_ray.serving.kv_cache import PagedAttention
from nesa_ray.serving.native.attention import STEP_FIELDS, NativeContext
from nesa_ray.serving.native.kernel import recorded
from nesa_ray.serving.native.tape import RECORDINGS, NotPlayable, Run, Tape
from nesa_ray.serving.packing import PACKED
from nesa_ray.serving.quantised import PRODUCT

log = logging.getLogger(__name__)
SEGMENT = "nesa.segment"  # the instruction, to be bound: inputs -> outputs
_KERNELS = {NORM, ROTATION, GATE, ADD, TAKE, PACKED, PRODUCT, ATTENTION}
_VIEWS = {
    "aten.slice.Tensor", "aten.view.default", "aten.reshape.default", "aten.transpose.int", "aten.unsqueeze.default",
    "aten.squeeze.dim", "aten.permute.default", "aten.select.int", "aten.alias.default", "aten._unsafe_view.default",
    "aten.split_with_sizes.default", "aten.split.Tensor", "operator.getitem", "aten.flatten.using_ints",
}  # fmt: skip
# Tokens, and sequences of one or two of them, of the steps that are recorded; none is 1, a size whose stride may be
# anything.
RECORDED = ((5, 3), (7, 6), (9, 5), (8, 4))
_SMALLEST = min(map(min, RECORDED))
_FEWEST = 3  # kernels that are worth it


def gather(program: StageProgram) -> tuple[StageProgram, dict[str, StageProgram]]:
    """The program with SEGMENT instructions, and by their names the programs of which they are one call."""
    runs = _runs(program)
    instructions: list[Instruction] = []
    segments: dict[str, StageProgram] = {}
    for i, run in enumerate(runs):
        if sum(s.target in _KERNELS for s in run) < _FEWEST:
            instructions += run
            continue
        outside = [s for r in (*runs[:i], *runs[i + 1 :]) for s in r]
        segment = _part(program, run, {n for s in outside for n in s.reads} | set(program.returns))
        name = f"segment_{i}"
        segments[name] = segment
        instructions.append(Instruction(name, SEGMENT, tuple(Ref(n) for n in segment.inputs), {}))
        parts = enumerate(segment.results)
        instructions += [Instruction(n, "operator.getitem", (Ref(name), k), {}) for k, n in parts]
    used = {n for s in instructions for n in s.reads}
    state = tuple(n for n in program.state if STATE + n in used)
    return replace(program, instructions=tuple(instructions), state=state), segments


def divide(program: StageProgram, awaited: Set[str]) -> tuple[StageProgram, StageProgram]:
    """(before, behind): what can be computed without the `awaited` values, and the rest, to which it is an input."""
    late = set(awaited)
    before: list[Instruction] = []
    behind: list[Instruction] = []
    for s in program.instructions:
        if late.isdisjoint(s.reads):
            before.append(s)
        else:
            behind.append(s)
            late.add(s.name)
    needed = {n for s in behind for n in s.reads} | set(program.returns)
    first = _part(program, before, needed)
    rest = _part(program, behind, set(program.returns))
    inputs = tuple(n for n in rest.inputs if n not in program.receives)
    given = tuple(n for n in first.results if n in program.returns and n not in inputs)
    last = replace(rest, inputs=inputs + given, receives=program.receives, sends=program.sends, results=program.results)
    return first, last


def _runs(program: StageProgram) -> list[list[Instruction]]:
    """The instructions in an order in which kernels, with their views, stay together, and so do others with theirs."""
    others: set[str] = set()
    needed: set[str] = set()  # by others, by way of views alone
    for s in reversed(program.instructions):
        if s.target not in _KERNELS | _VIEWS or (s.target in _VIEWS and s.name in needed):
            others.add(s.name)
            needed.update(s.reads)
    left = list(program.instructions)
    waiting = {s.name for s in left}
    runs: list[list[Instruction]] = []
    while left:
        run: list[Instruction] = []
        later: list[Instruction] = []
        for s in left:  # which are in an order that can run
            if (s.name in others) == (len(runs) % 2 == 0) and waiting.isdisjoint(s.reads):
                run.append(s)
                waiting.discard(s.name)
            else:
                later.append(s)
        runs.append(run)
        left = later
    return runs


def _part(program: StageProgram, run: Sequence[Instruction], used: Set[str]) -> StageProgram:
    """Some of the instructions by themselves, and those of their values that are `used` as results."""
    made = {s.name for s in run}
    reads = dict.fromkeys(n for s in run for n in s.reads)
    return replace(
        program,
        inputs=tuple(n for n in reads if n not in made and not n.startswith(STATE)),
        receives={},
        sends={},
        results=tuple(s.name for s in run if s.name in used),
        state=tuple(n for n in program.state if STATE + n in reads),
        instructions=tuple(run),
    )


class Segment(torch.nn.Module):
    """What a SEGMENT instruction is bound to.  Called as it is, without what torch has around a module's forward."""

    def __init__(
        self,
        program: StageProgram,
        state: Mapping[str, torch.Tensor],
        bind: Callable[[Instruction], Any],
        context: NativeContext,
    ) -> None:
        """`bind` gives the kernels of the instructions."""
        super().__init__()
        self._context = context
        self._tape: Tape | None = None
        self._runs: list[Run] | None = []
        self._fixed = [state[n] for n in program.state]
        self._attends = False

        def bound(step: Instruction) -> Any:
            kernel = bind(step)
            if isinstance(kernel, PagedAttention):
                self._fixed += (kernel.k_BGDP, kernel.v_BGPE)
                self._attends = True
            return kernel

        self._module = StageModule(program, state, attention=bound).requires_grad_(False)
        self._name = f"stage {program.id}: {program.instructions[0].name} to {program.instructions[-1].name}"

    @property
    def plays(self) -> bool:
        """Whether it has recorded enough."""
        return self._tape is not None

    def __call__(self, *values: Any) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        if self._runs is None or (self._attends and self._context.many):
            return self._module(*values)
        inputs = [v for v in values if isinstance(v, torch.Tensor)]
        sizes = self._context.sizes
        if self._tape is not None:
            if self._tape.plays(inputs, sizes):
                return self._tape.play(inputs, sizes, self._context.fields)
            return self._module(*values)
        if min(sizes) < _SMALLEST or any(r.sizes == sizes for r in self._runs):
            return self._module(*values)
        with recorded() as recording:
            outputs = self._module(*values)
        self._runs.append(Run(sizes, recording, inputs, outputs))
        if len(self._runs) == RECORDINGS:
            try:
                self._tape, self._runs = Tape(self._runs, self._fixed, STEP_FIELDS), []
            except NotPlayable as e:
                log.debug("%s can't be played as one call: %s", self._name, e)
                self._runs = None
        return outputs
