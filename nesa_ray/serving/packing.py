"""Matrix products of a CPU stage made fast: weights packed once, products of one input made one product.

Experts' products are grouped ones: the rows of each group meet a weight of their own (`grouped_products`).

Decoding reads every weight for a few rows.  A weight packed for the C++ kernel (native/products.py) is read at the
memory's speed: against oneDNN's packed form on one AVX-512 core 1.09 to 1.22 x as fast at 1 to 16 rows of 2048 x 2048
and 1.01 x at 256 (benchmarks/int8_weights.py); a plain weight is slower still.  Without AVX-512 oneDNN's form is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nesa_ray.graph.split import STATE, Instruction, Ref, StageProgram
from nesa_ray.serving.native.products import packed, packs

PACKED = "nesa.packed_product"  # the instruction, to be bound: (x, weight, bias, outputs)
GROUPED_PACKED = "nesa.grouped_packed_product"  # (x, offsets, outputs, weights, bias, outputs)
_ONEDNN = "mkldnn._linear_pointwise.default"
_GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}


def pack(
    program: StageProgram, state: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[StageProgram, dict[str, torch.Tensor]]:
    """The same program on packed weights, and `state` made its; as it was where there are none of dtype and device.

    No more than one weight is held twice at a time.  Those that are used otherwise too stay.
    """
    if device.type == "cpu" and packs(dtype):
        program, state = merge(program, state, products(program, state), "packed", _packed)
        return merge_grouped(program, state, grouped_products(program, state), "packed_groups", _packed_groups)
    if device.type == "cpu" and _onednn_packs(dtype):
        return merge(program, state, products(program, state), "packed", _packed_by_onednn)
    return program, state


def _packed(weight: torch.Tensor, bias: torch.Tensor | None, names: str) -> Operator:
    return _operator(PACKED, packed(weight), bias, (len(weight),))


def _packed_groups(weights: torch.Tensor, names: str) -> Operator:
    first = packed(weights[0])
    made = first.new_empty(len(weights), *first.shape)
    for group, weight in enumerate(weights):
        made[group] = packed(weight)
    return Operator(GROUPED_PACKED, {"weight": made}, ("weight", "bias"), (weights.shape[1],))


def _packed_by_onednn(weight: torch.Tensor, bias: torch.Tensor | None, names: str) -> Operator:
    made = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return _operator(_ONEDNN, made, bias, ("none", [], ""))


def _operator(target: str, weight: torch.Tensor, bias: torch.Tensor | None, options: tuple[Any, ...]) -> Operator:
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return Operator(target, tensors, ("weight", "bias"), options)


def _onednn_packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops, "mkldnn"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@dataclass(frozen=True, slots=True)
class Product:
    """An instruction that is input · weight + bias; `transposed` where the weight lies as [in, out]."""

    step: Instruction
    input: Ref
    weight: str
    bias: str | None
    transposed: bool

    def weight_of(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight, [out, in]."""
        return state[self.weight].t() if self.transposed else state[self.weight]


@dataclass(frozen=True, slots=True)
class Operator:
    """What a product becomes: target(input, *tensors in that order, None for those that aren't there, *options)."""

    target: str
    tensors: Mapping[str, torch.Tensor]
    order: tuple[str, ...]
    options: tuple[Any, ...] = ()


def products(program: StageProgram, state: Mapping[str, torch.Tensor]) -> list[Product]:
    """The program's products of something computed with a matrix of `state`, in their order."""
    return [p for s in program.instructions if (p := _product(s, state)) is not None]


def merge(
    program: StageProgram,
    state: dict[str, torch.Tensor],
    chosen: Sequence[Product],
    name: str,
    make: Callable[[torch.Tensor, torch.Tensor | None, str], Operator],
) -> tuple[StageProgram, dict[str, torch.Tensor]]:
    """The program with the chosen products replaced, and `state` made its.  Those of one input become one.

    `make` gives the operator for a weight [out, in], a bias [out], and the names of the weights that make it up; `name`
    begins the names of what is added.  A weight that only these products use is taken out of `state` once it is made.
    """
    readers = _readers(program)
    groups: dict[tuple[str, bool, bool], list[Product]] = {}
    for p in chosen:
        groups.setdefault((p.input.name, p.bias is None, p.transposed), []).append(p)
    made: dict[str, torch.Tensor] = {}
    replaced: dict[str, list[Instruction]] = {}
    for i, group in enumerate(groups.values()):
        weights = [p.weight_of(state) for p in group]
        biases = [state[p.bias] for p in group if p.bias is not None]
        operator = make(_joined(weights), _joined(biases) if biases else None, ", ".join(p.weight for p in group))
        names = {n: f"{name}.{i}.{n}" for n in operator.tensors}
        made |= {names[n]: t for n, t in operator.tensors.items()}
        sizes = [len(w) for w in weights]
        del weights
        for p in group:
            _take_out(state, p.weight, readers)
        tensors = (Ref(STATE + names[n]) if n in names else None for n in operator.order)
        call = Instruction(
            group[0].step.name if len(group) == 1 else f"{name}_{i}",
            operator.target,
            (group[0].input, *tensors, *operator.options),
            {},
        )
        replaced[group[0].step.name] = [call]
        start = 0
        for p, size in zip(group, sizes, strict=True):
            if len(group) > 1:
                part = Instruction(p.step.name, "aten.slice.Tensor", (Ref(call.name), -1, start, start + size), {})
                replaced.setdefault(p.step.name, []).append(part)
            start += size
    return _replaced(program, state, replaced, made)


@dataclass(frozen=True, slots=True)
class GroupedProduct:
    """An instruction that is input · weight for each group of the input's rows; rows before offsets[0] are the first's.

    weight      [groups, out, in], or where it is `transposed`, [groups, in, out]
    view        the transposition through which the step reads it; None: the step reads it as it is
    """

    step: Instruction
    input: Ref
    offsets: Ref
    weight: str
    transposed: bool
    view: str | None

    def turned(self, weight: torch.Tensor) -> torch.Tensor:
        """[groups, out, in]."""
        return weight.transpose(1, 2) if self.transposed else weight


def grouped_products(program: StageProgram, state: Container[str]) -> list[GroupedProduct]:
    """The program's grouped products with weights of `state`, in their order."""
    steps = {s.name: s for s in program.instructions}
    readers = Counter(n for s in program.instructions for n in s.reads) + Counter(program.returns)
    found = []
    for s in program.instructions:
        if s.target not in _GROUPED or s.kwargs or len(s.args) != 3 or not all(isinstance(a, Ref) for a in s.args):
            continue
        x, w, offsets = s.args
        view = steps.get(w.name)
        if view is not None and view.target == "aten.transpose.int" and readers[w.name] == 1:
            source, *dims = view.args
            weight = _owned(source, state) if sorted(d % 3 for d in dims) == [1, 2] else None
        else:
            view, weight = None, _owned(w, state)
        if weight is not None:
            found.append(GroupedProduct(s, x, offsets, weight, view is None, view.name if view else None))
    return found


def merge_grouped(
    program: StageProgram,
    state: dict[str, torch.Tensor],
    chosen: Sequence[GroupedProduct],
    name: str,
    make: Callable[[torch.Tensor, str], Operator],
    read: Callable[[str], torch.Tensor] | None = None,
) -> tuple[StageProgram, dict[str, torch.Tensor]]:
    """As `merge`, for grouped products: target(input, offsets, outputs, *tensors, *options).

    `make` gives the operator for a weight [groups, out, in] and its name; its tensors have the groups first.  `read`
    gives the weights that `state` hasn't, when their turn has come.
    """
    made: dict[str, torch.Tensor] = {}
    replaced: dict[str, list[Instruction]] = {}
    readers = _readers(program)
    for i, p in enumerate(chosen):
        weight = p.turned(read(p.weight) if read is not None and p.weight not in state else state[p.weight])
        outputs, operator = weight.shape[1], make(weight, p.weight)
        del weight
        _take_out(state, p.weight, readers)
        names = {n: f"{name}.{i}.{n}" for n in operator.tensors}
        made |= {names[n]: t for n, t in operator.tensors.items()}
        tensors = (Ref(STATE + names[n]) if n in names else None for n in operator.order)
        arguments = (p.input, p.offsets, outputs, *tensors, *operator.options)
        replaced[p.step.name] = [Instruction(p.step.name, operator.target, arguments, {})]
        if p.view is not None:
            replaced[p.view] = []
    return _replaced(program, state, replaced, made)


def _readers(program: StageProgram) -> Counter[str]:
    """How many instructions read each parameter and buffer."""
    return Counter(n for s in program.instructions for n in state_names(s))


def _take_out(state: dict[str, torch.Tensor], name: str, readers: Counter[str]) -> None:
    """One of its readers is gone."""
    readers[name] -= 1
    if not readers[name]:
        state.pop(name, None)


def _replaced(
    program: StageProgram,
    state: dict[str, torch.Tensor],
    replaced: Mapping[str, Sequence[Instruction]],
    made: Mapping[str, torch.Tensor],
) -> tuple[StageProgram, dict[str, torch.Tensor]]:
    """The program with instructions in place of others, and `state` made its, with what was made."""
    instructions = tuple(i for s in program.instructions for i in replaced.get(s.name, [s]))
    used = {r for s in instructions for r in state_names(s)}
    for name in state.keys() - used:
        del state[name]
    state |= made
    names = (*(n for n in program.state if n in used), *made)
    return replace(program, instructions=instructions, state=names), state


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _product(step: Instruction, state: Mapping[str, torch.Tensor]) -> Product | None:
    if step.kwargs:
        return None
    if step.target == "aten.linear.default":
        x, w, b = (*step.args, None)[:3]
        transposed = False
    elif step.target == "aten.addmm.default":
        b, x, w = step.args
        transposed = True
    else:
        return None
    weight, bias = _owned(w, state), _owned(b, state)
    plain = isinstance(x, Ref) and not x.name.startswith(STATE)
    if weight is None or not plain or state[weight].dim() != 2 or (b is not None and bias is None):
        return None
    return Product(step, x, weight, bias, transposed)


def _owned(argument: Any, state: Container[str]) -> str | None:
    """The name of the argument in `state`, if it is one of it."""
    name = argument.name.removeprefix(STATE) if isinstance(argument, Ref) and argument.name.startswith(STATE) else None
    return name if name in state else None


def state_names(step: Instruction) -> set[str]:
    """The parameters and buffers that an instruction reads."""
    return {n.removeprefix(STATE) for n in step.reads if n.startswith(STATE)}
