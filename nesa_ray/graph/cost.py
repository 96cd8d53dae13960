"""What one operator costs, from the shapes it was captured with: flops, bytes moved."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import nesa_ray.graph.attention  # noqa: F401 - registers nesa::attention

aten = torch.ops.aten

# Operators that only reinterpret memory: no flops, nothing moved, nothing saved.
VIEWS = {
    aten.view, aten._unsafe_view, aten.transpose, aten.permute, aten.t, aten.slice, aten.select, aten.unsqueeze,
    aten.squeeze, aten.expand, aten.expand_as, aten.alias, aten.detach, aten.split, aten.split_with_sizes, aten.chunk,
    aten.tensor_split, aten.unbind, aten.unflatten, aten.narrow, aten.view_as, aten.movedim, aten.lift_fresh_copy,
}  # fmt: skip
# Operators that are views where memory and dtype allow it, copies elsewhere.
_MAYBE_VIEWS = {
    aten.reshape, aten.reshape_as, aten.flatten, aten.contiguous, aten.to, aten._to_copy, aten.type_as,
}  # fmt: skip
# Operators that read the elements they choose, not all of their first argument.
_CHOOSES = {aten.embedding, aten.index, aten.index_select, aten.gather}


@dataclass(frozen=True, slots=True)
class OpCost:
    """Costs of one operator at the captured shapes."""

    flops: float
    access_bytes: float
    output_bytes: float


def packet(node: fx.Node) -> Any:
    """The operator without its overload: aten.add for aten.add.Tensor."""
    return getattr(node.target, "overloadpacket", node.target)


def number(x: Any) -> int:
    """A dimension's value at the captured shapes (a symbol counts as its hint)."""
    if isinstance(x, torch.SymInt):
        hint = x.node.hint
        return int(hint) if hint is not None else 1
    return int(x)


def shape(value: torch.Tensor) -> tuple[int, ...]:
    """The tensor's shape at the captured shapes."""
    return tuple(number(d) for d in value.shape)


def tensors(value: Any) -> Iterable[torch.Tensor]:
    """The tensors in a node's meta value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors(v)


def n_bytes(value: Any) -> int:
    """Bytes of the tensors in a node's meta value."""
    return sum(math.prod(shape(t)) * t.element_size() for t in tensors(value))


def op_cost(node: fx.Node) -> OpCost:
    """Costs of one call_function node."""
    op, out = packet(node), node.meta.get("val")
    sources = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    output_bytes = n_bytes(out)
    if is_view(node):
        return OpCost(0.0, 0.0, output_bytes)
    if (opaque := node.meta.get("opaque")) is not None:
        return OpCost(opaque.flops, output_bytes + sum(n_bytes(s.meta["val"]) for s in sources), output_bytes)
    formula = FLOPS.get(op) or NAMED_FLOPS.get(str(op))
    if formula is not None:
        flops = formula(*[_value(a) for a in node.args], **{k: _value(v) for k, v in node.kwargs.items()})
    else:
        flops = float(
            max(
                [math.prod(shape(t)) for t in tensors(out)] + [math.prod(shape(_value(s))) for s in sources[:1]],
                default=0,
            )
        )
    access = output_bytes + sum(_read_bytes(node, s) for s in sources)
    return OpCost(float(flops), float(access), output_bytes)


def is_view(node: fx.Node) -> bool:
    """Whether the node only reinterprets memory (a cast to the dtype that is already there counts)."""
    op = packet(node)
    if op in _MAYBE_VIEWS:
        source, out = node.args[0], node.meta.get("val")
        before = source.meta.get("val") if isinstance(source, fx.Node) else None
        if not isinstance(before, torch.Tensor) or not isinstance(out, torch.Tensor) or before.dtype != out.dtype:
            return False
        return before.is_contiguous() or _viewable(before, out)
    return op in VIEWS or getattr(op, "__name__", "") == "getitem"


def _viewable(before: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `out` can show the memory of `before`, whose elements don't lie in order."""
    layout = tuple(number(d) for d in before.stride())
    if shape(before) == shape(out):
        return layout == tuple(number(d) for d in out.stride())
    try:
        torch.empty_strided(shape(before), layout, device="meta").view(shape(out))
    except RuntimeError:
        return False
    return True


def _read_bytes(node: fx.Node, source: fx.Node) -> int:
    if packet(node) in _CHOOSES and source is node.args[0]:
        return n_bytes(node.meta["val"])
    return n_bytes(source.meta["val"])


def _value(arg: Any) -> Any:
    return arg.meta.get("val") if isinstance(arg, fx.Node) else arg


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> float:
    return 2.0 * math.prod(shape(x)) * shape(weight)[0]


def _matmul(a: torch.Tensor, b: torch.Tensor) -> float:
    columns = shape(b)[-1] if b.dim() > 1 else 1
    lead = max(math.prod(shape(a)[:-2]), math.prod(shape(b)[:-2]))
    rows = shape(a)[-2] if a.dim() > 1 else 1
    return 2.0 * lead * rows * shape(a)[-1] * columns


def _addmm(_: Any, a: torch.Tensor, b: torch.Tensor, **__: Any) -> float:
    return _matmul(a, b)


def _grouped(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * math.prod(shape(x)) * shape(weight)[-1]  # each row meets one expert's weight


def _einsum(equation: str, operands: Any, **_: Any) -> float:
    sizes: dict[str, int] = {}
    for letters, x in zip(equation.split("->")[0].replace(" ", "").split(","), operands, strict=True):
        value = _value(x)
        lead = value.dim() - len(letters.replace("...", ""))
        named = letters.replace("...", "0123456789"[:lead])
        sizes |= dict(zip(named, shape(value), strict=True))
    return 2.0 * math.prod(sizes.values())


def _recurrent(x: torch.Tensor, _: Any, weights: Any, *__: Any, **___: Any) -> float:
    rows = math.prod(shape(x)[:-1])
    return 2.0 * rows * sum(math.prod(shape(_value(w))) for w in weights if _value(w).dim() == 2)


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
                 dilation: Any = 1, *_: Any, **__: Any) -> float:  # fmt: skip
    spatial = shape(x)[2:]
    each = [
        tuple(v) * len(spatial) if isinstance(v, list | tuple) and len(v) == 1 else v
        for v in (stride, padding, dilation)
    ]
    s, p, d = [v if isinstance(v, list | tuple) else (v,) * len(spatial) for v in each]
    if isinstance(padding, str):
        p = tuple((k - 1) // 2 if padding == "same" else 0 for k in shape(weight)[2:])
    kernel = shape(weight)[2:]
    out = [
        (n + 2 * number(p[i]) - number(d[i]) * (kernel[i] - 1) - 1) // number(s[i]) + 1 for i, n in enumerate(spatial)
    ]
    return 2.0 * shape(x)[0] * math.prod(out) * math.prod(shape(weight))


def _conv_transpose(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * shape(x)[0] * math.prod(shape(x)[2:]) * math.prod(shape(weight))


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> float:
    batch, heads, tokens, width = shape(q)
    full = 2.0 * batch * heads * tokens * shape(k)[-2] * (width + shape(v)[-1])
    causal = bool(args[2]) if len(args) > 2 else bool(kwargs.get("is_causal", False))
    return full / 2 if causal else full


FLOPS: dict[Any, Callable[..., float]] = {
    aten.linear: _linear,
    aten.matmul: _matmul, aten.mm: _matmul, aten.bmm: _matmul,
    aten.addmm: _addmm, aten.baddbmm: _addmm,
    aten._grouped_mm: _grouped, aten.einsum: _einsum,
    aten.lstm: _recurrent, aten.gru: _recurrent, aten.rnn_tanh: _recurrent, aten.rnn_relu: _recurrent,
    aten.conv1d: _convolution, aten.conv2d: _convolution, aten.conv3d: _convolution, aten.convolution: _convolution,
    aten.conv_transpose1d: _conv_transpose, aten.conv_transpose2d: _conv_transpose,
    aten.conv_transpose3d: _conv_transpose,
    torch.ops.nesa.attention: _attention, aten.scaled_dot_product_attention: _attention,
}  # fmt: skip
NAMED_FLOPS: dict[str, Callable[..., float]] = {"transformers.grouped_mm_fallback": _grouped}
