"""Products with weights in int8, and their outlier columns in bfloat16: half the memory of bfloat16 weights.

LLM.int8() (Dettmers et al., arXiv 2208.07339) scales each row of a weight by its largest magnitude, and multiplies the
input features that are far out of range apart, in 16 bit.  It quantises activations to 8 bit as well, so it looks for
outliers among them while it runs.  Here activations keep 16 bit (see native/products.py): what is lost, is lost of the
weights, and the outlier columns are found in the weights alone, once.

N outputs, K inputs, O outlier columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from nesa_ray.errors import CheckpointError
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.split import StageProgram, split
from nesa_ray.serving.native.products import Grouped, Int8Product, PackedProduct
from nesa_ray.serving.packing import (
    GROUPED_PACKED,
    PACKED,
    Operator,
    grouped_products,
    merge,
    merge_grouped,
    products,
    state_names,
)

PRODUCT = "nesa.int8_product"  # the instruction, to be bound: (x, values, scales, outliers, columns, bias)
GROUPED_PRODUCT = "nesa.grouped_int8_product"  # (x, offsets, outputs, values, scales, outliers, columns, bias)
THRESHOLD = 6.0  # LLM.int8()'s, in root mean squares of a row
MOST_OUTLIERS = 0.01  # of the columns
TINY = 2.0**-110  # rows whose magnitudes are all less become zeros
_AT_ONCE = 1 << 22  # weights that are computed with at the same time, in float32
_PARTS = ("values", "scales", "outliers", "columns")


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight [N, K]: values · scales, but for the outlier columns.

    values    int8 [N, K], zero in the outlier columns
    scales    float32 [N]
    outliers  bfloat16 [O, N]
    columns   int64 [O], which of the K they are
    """

    values: torch.Tensor
    scales: torch.Tensor
    outliers: torch.Tensor
    columns: torch.Tensor

    def dequantised(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """The weight, or some of its rows, dense."""
        dense = self.values[rows].float() * self.scales[rows, None]
        dense[:, self.columns] = self.outliers[:, rows].t().float()
        return dense.to(dtype)


def quantise(weight: torch.Tensor, name: str = "weight") -> Int8Weight:
    """A floating-point weight [N, K] as int8.  Raises CheckpointError with its name where it isn't finite.

    With most_i the largest magnitude of row i outside of the outlier columns, an error is at most most_i / 253 there,
    and |w| / 256 in the outlier columns, each + 2^-110.

    A row's one large value makes all of the row coarse, by as much as it is larger.  So a column costs the sum over the
    rows of what (w / the row's root mean square)² has beyond THRESHOLD²; the outlier columns are those that cost
    anything, the most expensive first, up to MOST_OUTLIERS of all.  Normally distributed weights have none.
    """
    cost = _column_costs(weight, name)
    return _quantise(weight, cost, _outlying(cost))


def _quantise(weight: torch.Tensor, cost: torch.Tensor, outlying: int) -> Int8Weight:
    columns = cost.topk(outlying).indices.sort().values
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    for rows in _blocks(weight):
        w = weight[rows].to(torch.float32, copy=True)
        w[:, columns] = 0
        most = w.abs().amax(1)
        w *= torch.where(most < TINY, 0.0, 127 / most)[:, None]
        values[rows] = w.round_().to(torch.int8)
        step = torch.nextafter(most / 127, torch.zeros(()))  # 127 steps don't exceed `most`: it may be float32's last
        scales[rows] = torch.where(most < TINY, 0.0, step)
    largest = torch.finfo(torch.bfloat16).max
    outliers = _apart(len(columns), len(weight))
    outliers.copy_(weight[:, columns].float().clamp_(-largest, largest).t())
    return Int8Weight(values, scales, outliers, columns)


def _column_costs(weight: torch.Tensor, name: str) -> torch.Tensor:
    cost = torch.zeros(weight.shape[1])
    for rows in _blocks(weight):
        w = weight[rows].to(torch.float32, copy=True).abs_()
        most = w.amax(1, keepdim=True)
        if not bool(most.isfinite().all()):
            raise CheckpointError(f"{name}: has values that aren't finite, which int8 can't hold")
        w = w.div_(most.clamp_(min=TINY)).square_()
        cost += w.div_(w.mean(1, keepdim=True).clamp_(min=TINY)).sub_(THRESHOLD**2).relu_().sum(0)
    return cost


def _outlying(cost: torch.Tensor) -> int:
    """How many columns are to be outliers."""
    return min(int((cost > 0).sum()), _most_outliers(len(cost)))


def quantise_groups(weights: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Weights [groups, N, K] as int8: an Int8Weight's parts with the groups first, as many outliers in each."""
    costs = [_column_costs(w, f"{name}[{group}]") for group, w in enumerate(weights)]
    outlying = max(map(_outlying, costs))
    groups, outputs, inputs = weights.shape
    parts = {
        "values": torch.empty(groups, outputs, inputs, dtype=torch.int8),
        "scales": torch.empty(groups, outputs),
        "outliers": _apart(groups, outlying, outputs),
        "columns": torch.empty(groups, outlying, dtype=torch.int64),
    }
    for group, (weight, cost) in enumerate(zip(weights, costs, strict=True)):
        made = _quantise(weight, cost, outlying)
        for kind, part in parts.items():
            part[group] = getattr(made, kind)
    return parts


def _apart(*shape: int) -> torch.Tensor:
    """Of outliers: not a power of two apart, where rows would share few places of a cache."""
    *outer, outputs = shape
    return torch.empty(*outer, outputs + 32, dtype=torch.bfloat16)[..., :outputs]


def _most_outliers(inputs: int) -> int:
    return math.ceil(inputs * MOST_OUTLIERS)


def _blocks(weight: torch.Tensor) -> Iterator[slice]:
    size = max(1, _AT_ONCE // weight.shape[1])
    for at in range(0, len(weight), size):
        yield slice(at, at + size)


def quantise_products(
    program: StageProgram,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor] | None = None,
) -> tuple[StageProgram, dict[str, torch.Tensor]]:
    """The program with PRODUCT instructions, and `state` made its: what isn't quantised is cast to `dtype`.

    `state` may be as the checkpoint has it, in any floating-point dtype.  A weight that is used otherwise too, as that
    of a tied embedding, stays for that use.  `read` gives the experts' weights that `state` hasn't, one by one.  Raises
    CheckpointError.
    """
    given = set(state)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    def make(weight: torch.Tensor, bias: torch.Tensor | None, names: str) -> Operator:
        made = quantise(weight, names)
        tensors = {n: getattr(made, n) for n in _PARTS}
        return Operator(PRODUCT, tensors if bias is None else {**tensors, "bias": cast(bias)}, (*_PARTS, "bias"))

    def make_groups(weights: torch.Tensor, name: str) -> Operator:
        return Operator(GROUPED_PRODUCT, quantise_groups(weights, name), (*_PARTS, "bias"))

    program, state = merge(program, state, products(program, state), "quantised", make)
    grouped = grouped_products(program, program.state)
    program, state = merge_grouped(program, state, grouped, "quantised_groups", make_groups, read)
    state.update((n, cast(state[n])) for n in given & set(state))
    return program, state


def bind_product(target: str, dtype: torch.dtype, *, native: bool) -> Callable[..., torch.Tensor] | None:
    """What an instruction is bound to, packed products' included, with or without kernels; None: it isn't a product."""
    if target in (PACKED, GROUPED_PACKED):
        product: Callable[..., torch.Tensor] = PackedProduct(dtype)
    elif target in (PRODUCT, GROUPED_PRODUCT):
        product = Int8Product(dtype) if native else int8_product
    else:
        return None
    return Grouped(product) if target in (GROUPED_PACKED, GROUPED_PRODUCT) else product


def int8_product(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    outliers: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """PRODUCT by torch, on any device: x [..., K] -> [..., N], the weight made dense in x's dtype block by block."""
    weight = Int8Weight(values, scales, outliers, columns)
    return torch.cat(
        [linear(x, weight.dequantised(x.dtype, b), None if bias is None else bias[b]) for b in _blocks(values)], -1
    )


def with_quantised_costs(captured: Captured) -> Captured:
    """The same program with the parameters' bytes, held and read, that it has with int8 products.

    Outlier columns are counted as if there were as many as there may be.
    """
    (program,) = split(captured, dict.fromkeys(captured.node_id.values(), 0))
    made: dict[str, float] = {}
    reads: dict[str, str] = {}  # instruction -> the weight that it reads
    computes: dict[str, str] = {}  # … that it multiplies with
    for p in products(program, captured.state):
        reads[p.step.name] = computes[p.step.name] = p.weight
        made[p.weight] = _int8_bytes(p.weight_of(captured.state).shape)
    for g in grouped_products(program, captured.state):
        reads[g.view or g.step.name] = computes[g.step.name] = g.weight
        made[g.weight] = _int8_bytes(g.turned(captured.state[g.weight]).shape)
    owned: set[str] = set()
    param_bytes: dict[int, float] = {}
    saved_bytes: dict[int, float] = {}
    for step in program.instructions:
        if step.name not in captured.node_id:
            continue
        node = captured.node_id[step.name]
        names = state_names(step) - owned
        param_bytes[node], saved_bytes[node] = 0.0, 0.0
        if (read := reads.get(step.name)) is not None:
            names.discard(read)
            param_bytes[node] = made[read]
        if (met := computes.get(step.name)) is not None:
            saved_bytes[node] = captured.state[met].nbytes - made[met]
        owned |= names
        param_bytes[node] += sum(captured.state[n].nbytes for n in names)
    nodes = (
        replace(n, param_bytes=param_bytes[int(n.id)], access_bytes=n.access_bytes - saved_bytes[int(n.id)])
        for n in captured.graph.nodes
    )
    return replace(captured, graph=captured.graph.with_nodes(nodes))


def _int8_bytes(shape: Sequence[int]) -> float:
    """Of a weight [..., N, K] as int8."""
    *groups, outputs, inputs = shape
    outlying = _most_outliers(inputs)
    return float(math.prod(groups) * (outputs * (inputs + 4 + 2 * outlying) + 8 * outlying))
