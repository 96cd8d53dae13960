"""Chains of small operators -> one kernel each, found by their form; constants, and what is equal, computed once.

At a few rows a step's time beside its matrix products is the number of operators.  The chains are those that nearly
every decoder has: root-mean-square norm, rotary positions, gated activation.  Whatever isn't exactly of that form stays
as it is, so nothing here can be wrong about an architecture, only miss it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from nesa_ray.graph.split import STATE, Instruction, Ref, StageModule, StageProgram

NORM, ROTATION, GATE, ADD, TAKE = "nesa.norm", "nesa.rotation", "nesa.gate", "nesa.add", "nesa.take"
_NO_EFFECT = {"aten.detach.default", "aten.contiguous.default", "aten.dropout.default"}


def fold_constants(
    program: StageProgram, state: Mapping[str, torch.Tensor]
) -> tuple[StageProgram, dict[str, torch.Tensor]]:
    """Instructions of state alone are computed now, and become state; operators without effect go."""
    constant: dict[str, Instruction] = {}
    kept: list[Instruction] = []
    renamed: dict[str, str] = {}
    for step in program.instructions:
        step = _renamed(step, renamed)
        refs = step.reads
        passes = step.target in _NO_EFFECT and isinstance(step.args[0], Ref) and step.name not in program.returns
        if passes and step.target != "aten.contiguous.default":
            renamed[step.name] = step.args[0].name
        elif refs and all(r.startswith(STATE) or r in constant for r in refs) and step.name not in program.returns:
            constant[step.name] = step
        else:
            kept.append(step)
    wanted = tuple(dict.fromkeys(r for s in kept for r in s.reads if r in constant))
    if not wanted:
        return replace(program, instructions=tuple(kept)), dict(state)
    part = replace(
        program,
        inputs=(),
        receives={},
        sends={},
        results=wanted,
        trainable=frozenset(),
        instructions=tuple(constant.values()),
    )
    values = StageModule(part, state)()
    made = {f"constant.of_{n}": v for n, v in zip(wanted, values, strict=True)}
    names = {n: f"{STATE}constant.of_{n}" for n in wanted}
    instructions = tuple(_renamed(s, names) for s in kept)
    used = {r.removeprefix(STATE) for s in instructions for r in s.reads if r.startswith(STATE)}
    folded = {n: t for n, t in {**state, **made}.items() if n in used}
    return replace(program, instructions=instructions, state=tuple(folded)), folded


def fuse(program: StageProgram, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> StageProgram:
    """The program with what kernels can do: chains as NORM, ROTATION and GATE, sums as ADD, choices of rows as TAKE."""
    chains = _Chains(program, state, dtype)
    replaced: dict[str, Instruction] = {}
    gone: set[str] = set()
    for step in reversed(program.instructions):
        if step.name in gone:
            continue
        forms = (chains.norm, chains.rotation, chains.gate, chains.add, chains.take)
        found = next((f for form in forms if (f := form(step)) is not None), None)
        if found is not None:
            replaced[step.name], inner = found
            gone |= inner
    instructions = tuple(replaced.get(s.name, s) for s in program.instructions if s.name not in gone)
    return replace(program, instructions=instructions)


def compute_once(program: StageProgram) -> StageProgram:
    """The program without instructions that compute the same from the same as one before them.

    Models choose the shape of their positions' cosines in every layer anew.  To be used behind `fuse`: a chain whose
    inner values have two uses isn't one.
    """
    first: dict[str, str] = {}
    renamed: dict[str, str] = {}
    kept: list[Instruction] = []
    for step in program.instructions:
        step = _renamed(step, renamed)
        said = repr((step.target, step.args, sorted(step.kwargs.items())))
        if said in first and _pure(step.target) and step.name not in program.returns:
            renamed[step.name] = first[said]
        else:
            first.setdefault(said, step.name)
            kept.append(step)
    return replace(program, instructions=tuple(kept))


def _pure(target: str) -> bool:
    """Whether the operator changes nothing and always does the same."""
    if not target.startswith("aten."):
        return target == "operator.getitem"
    _, name, overload = target.split(".")
    operator = getattr(getattr(torch.ops.aten, name), overload)
    return not operator._schema.is_mutable and torch.Tag.nondeterministic_seeded not in operator.tags


class _Chains:
    """Looks for chains that end in an instruction; their inner values must have no other use."""

    def __init__(self, program: StageProgram, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._state, self._dtype = state, dtype
        self._by_name = {s.name: s for s in program.instructions}
        self._uses: dict[str, int] = dict.fromkeys(program.returns, 1)
        for s in program.instructions:
            for r in set(s.reads):
                self._uses[r] = self._uses.get(r, 0) + 1

    def _made_by(self, value: Any, target: str, uses: int = 1) -> Instruction | None:
        """The instruction that makes `value`, if it is a `target` and the value is used so often."""
        step = self._by_name.get(value.name) if isinstance(value, Ref) else None
        return step if step is not None and step.target == target and self._uses[step.name] == uses else None

    def norm(self, step: Instruction) -> tuple[Instruction, set[str]] | None:
        """mul(weight, [to](mul([to] x, rsqrt(add(mean(pow(x, 2), [-1], True), epsilon))))), either order of factors."""
        if step.target != "aten.mul.Tensor" or len(step.args) != 2:
            return None
        for weight, scaled in (step.args, step.args[::-1]):
            if not (isinstance(weight, Ref) and weight.name.startswith(STATE)):
                continue
            if self._state[weight.name.removeprefix(STATE)].dtype != self._dtype:
                continue
            inner: set[str] = set()
            cast = self._made_by(scaled, "aten.to.dtype")
            if cast is not None and cast.args[1:] == (self._dtype,):
                inner.add(cast.name)
                scaled = cast.args[0]
            elif self._dtype != torch.float32:
                continue
            product = self._made_by(scaled, "aten.mul.Tensor")
            root = self._made_by(product.args[1], "aten.rsqrt.default") if product else None
            shifted = self._made_by(root.args[0], "aten.add.Tensor") if root else None
            mean = self._made_by(shifted.args[0], "aten.mean.dim") if shifted else None
            square = self._made_by(mean.args[0], "aten.pow.Tensor_Scalar") if mean else None
            if product is None or root is None or shifted is None or mean is None or square is None:
                continue
            x = square.args[0]
            plain = square.args[1] == 2 and mean.args[1:] == ([-1], True) and isinstance(shifted.args[1], float)
            if not plain or product.args[0] != x:
                continue
            inner |= {s.name for s in (product, root, shifted, mean, square)}
            widened = self._made_by(x, "aten.to.dtype", uses=2)
            if widened is not None and widened.args[1:] == (torch.float32,):
                inner.add(widened.name)
                x = widened.args[0]
            elif self._dtype != torch.float32:
                continue
            return Instruction(step.name, NORM, (x, weight, shifted.args[1]), {}), inner
        return None

    def rotation(self, step: Instruction) -> tuple[Instruction, set[str]] | None:
        """add(mul(x, cosine), mul(cat([neg(slice(x, half …)), slice(x, 0 … half)], -1), sine))"""
        if step.target != "aten.add.Tensor" or len(step.args) != 2:
            return None
        straight = self._made_by(step.args[0], "aten.mul.Tensor")
        crossed = self._made_by(step.args[1], "aten.mul.Tensor")
        halves = self._made_by(crossed.args[0], "aten.cat.default") if crossed else None
        if (
            straight is None
            or crossed is None
            or halves is None
            or halves.args[1:] != (-1,)
            or len(halves.args[0]) != 2
        ):
            return None
        minus = self._made_by(halves.args[0][0], "aten.neg.default")
        high = self._made_by(minus.args[0], "aten.slice.Tensor") if minus else None
        low = self._made_by(halves.args[0][1], "aten.slice.Tensor")
        if minus is None or high is None or low is None:
            return None
        x, half = straight.args[0], low.args[3]
        if low.args != (x, 3, 0, half) or high.args != (x, 3, half, sys.maxsize):
            return None
        inner = {s.name for s in (straight, crossed, halves, minus, high, low)}
        return Instruction(step.name, ROTATION, (x, straight.args[1], crossed.args[1]), {}), inner

    def gate(self, step: Instruction) -> tuple[Instruction, set[str]] | None:
        """mul(silu(a), b)"""
        if step.target != "aten.mul.Tensor" or len(step.args) != 2:
            return None
        silu = self._made_by(step.args[0], "aten.silu.default")
        if silu is None or not isinstance(step.args[1], Ref) or step.args[1].name.startswith(STATE):
            return None
        return Instruction(step.name, GATE, (silu.args[0], step.args[1]), {}), {silu.name}

    def add(self, step: Instruction) -> tuple[Instruction, set[str]] | None:
        """add(a, b) of two values"""
        values = [a for a in step.args if isinstance(a, Ref) and not a.name.startswith(STATE)]
        if step.target != "aten.add.Tensor" or len(values) != len(step.args) or step.kwargs:
            return None
        return Instruction(step.name, ADD, step.args, {}), set()

    def take(self, step: Instruction) -> tuple[Instruction, set[str]] | None:
        """embedding(weight, index), index_select(x, dimension, index)"""
        if step.target == "aten.embedding.default" and not step.kwargs:
            weight, index, *_ = step.args  # what follows is about gradients
            return Instruction(step.name, TAKE, (weight, 0, index), {}), set()
        if step.target == "aten.index_select.default" and not step.kwargs:
            return Instruction(step.name, TAKE, step.args, {}), set()
        return None


def _renamed(step: Instruction, names: Mapping[str, str]) -> Instruction:
    def rename(r: Ref) -> Ref:
        return Ref(names[r.name]) if r.name in names else r

    return replace(step, args=_walk(step.args, rename), kwargs={k: _walk(v, rename) for k, v in step.kwargs.items()})


def _walk(value: Any, change: Callable[[Ref], Ref]) -> Any:
    if isinstance(value, Ref):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_walk(v, change) for v in value)
    return value
