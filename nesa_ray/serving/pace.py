"""How fast devices serve, by the kernels that stages run: what a plan for serving is made with.

All rows of a step meet a weight together: a product takes as long as reading it, and longer by each row, which is
measured with one row, some and many.  Attention goes by the positions of the cache that the step's tokens see.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from nesa_ray.cluster.measure import level
from nesa_ray.cluster.topology import Link, Topology
from nesa_ray.graph.graph import Graph, Node, NodeId
from nesa_ray.graph.split import ATTENTION
from nesa_ray.serving.kv_cache import HeadShape
from nesa_ray.serving.native.attention import bind, context_for
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.products import PackedProduct, packs
from nesa_ray.serving.pages import zeros
from nesa_ray.serving.quantised import PRODUCT, bind_product
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Sequence as Tokens
from nesa_ray.serving.scheduler import Work
from nesa_ray.serving.step import Step, pack_step

# What a value that crosses takes at either end at least, however fast the link.  This share of a stage's time too: an
# evener cut through more values is worth it only where it is evener by more than these figures can tell.
MESSAGE_S, MESSAGE_SHARE = 1e-4, 0.01
_WEIGHT_BYTES, _INPUTS, _ROWS = 1 << 27, 1024, (1, 32, 96)
_SEQUENCES, _POSITIONS, _CHUNK = 16, 192, 32
_SEEN = [_POSITIONS] * _SEQUENCES + list(range(_POSITIONS - _CHUNK + 1, _POSITIONS + 1))  # by each token
_CACHED = 5.0  # activations are in a cache: read so much faster than weights
_TRIES = 7
_ATTENTION_SHARE = 0.2  # of products' flops per second, where it isn't measured

Seconds = dict[NodeId, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Pace:
    """Of one device.

    products               (flops, seconds) for a byte of a weight, by flops; straight between these points and beyond
    attention_flops_per_s  of attention over the cache
    """

    products: tuple[tuple[float, float], ...]
    attention_flops_per_s: float

    @classmethod
    def of(cls, bytes_per_s: float, flops_per_s: float, attention_flops_per_s: float) -> Pace:
        """One for which reading and multiplying add up."""
        points = ((0.0, 1 / bytes_per_s), (1.0, 1 / bytes_per_s + 1 / flops_per_s))
        return cls(points, attention_flops_per_s)

    def seconds(self, node: Node) -> float:
        """Of the node in one step."""
        if node.op == ATTENTION:
            return node.flops / self.attention_flops_per_s
        read = min(node.access_bytes, node.param_bytes)
        moved_s = (node.access_bytes - read) / _CACHED * self.products[0][1]
        if not read:
            (f, s), (g, t) = self.products[-2:]
            return moved_s + node.flops * (t - s) / (g - f)
        return moved_s + read * self._byte_s(node.flops / read)

    def _byte_s(self, flops: float) -> float:
        """Seconds of a byte of a weight that so many flops come with."""
        pairs = list(itertools.pairwise(self.products))
        (f, s), (g, t) = next((p for p in pairs if flops <= p[1][0]), pairs[-1])
        return max(s + (flops - f) * (t - s) / (g - f), 0.0)


def stated(topology: Topology) -> dict[str, Pace] | None:
    """Of devices as a topology describes them; None where it doesn't say how fast they compute and read."""
    if not all(d.flops_per_s and d.memory_bytes_per_s for d in topology.devices):
        return None
    return {
        d.id: Pace.of(d.memory_bytes_per_s, d.flops_per_s, _ATTENTION_SHARE * d.flops_per_s) for d in topology.devices
    }


def measure(where: str, dtype: torch.dtype, quantised: bool, shape: HeadShape, block_size: int) -> Pace:
    """Of the torch device `where`, "cpu" as this process is pinned: half a second.

    dtype, quantised   as StageSpec has them
    shape, block_size  of the attention and its cache
    """
    device = torch.device(where)
    with torch.inference_mode():
        product, n_bytes, row_flops = _product(device, dtype, quantised)
        rows = torch.ones(max(_ROWS), _INPUTS, dtype=dtype, device=device)
        calls: list[Callable[[], object]] = [
            *(partial(product, rows[:count]) for count in _ROWS),
            _attention(device, dtype, shape, block_size),
        ]
        *took, attention_s = _seconds(calls, device)
        seconds = list(itertools.accumulate(took, max))  # more rows never take less, whatever else ran meanwhile
    positions = sum(_SEEN)
    return Pace(
        products=tuple((n * row_flops / n_bytes, s / n_bytes) for n, s in zip(_ROWS, seconds, strict=True)),
        attention_flops_per_s=2.0 * positions * shape.heads * (shape.key_width + shape.value_width) / attention_s,
    )


def paced(graph: Graph, topology: Topology, paces: Mapping[str, Pace]) -> tuple[Seconds, Topology]:
    """`partition`'s seconds, and the topology with each device's speed and links that take what a message does.

    A kind's seconds are those of its fastest device.
    """
    whole_s = [math.fsum(map(paces[d.id].seconds, graph.nodes)) for d in topology.devices]
    speeds = level([1 / s if s else 1.0 for s in whole_s], topology.devices)
    fastest: dict[str, tuple[float, str]] = {}
    for d, speed in zip(topology.devices, speeds, strict=True):
        fastest[d.kind] = max(fastest.get(d.kind, (0.0, "")), (speed, d.id))
    seconds = {n.id: {kind: paces[d].seconds(n) for kind, (_, d) in fastest.items()} for n in graph.nodes}
    given = zip(topology.devices, speeds, strict=True)
    devices = tuple(replace(d, speed=speed / fastest[d.kind][0]) for d, speed in given)
    message_s = max(MESSAGE_S, MESSAGE_SHARE / math.fsum(speeds))  # of stages as long as their share of the work takes
    pairs = {pair: _with_messages(link, message_s) for pair, link in topology.pairs.items()}
    return seconds, replace(topology, devices=devices, default=_with_messages(topology.default, message_s), pairs=pairs)


def _with_messages(link: Link, message_s: float) -> Link:
    return replace(link, latency_s=max(link.latency_s, message_s))


def _product(
    device: torch.device, dtype: torch.dtype, quantised: bool
) -> tuple[Callable[[torch.Tensor], object], int, int]:
    """A product as a stage has it: of x with a weight; the weight's bytes, and the flops of a row."""
    kind = torch.int8 if quantised else dtype
    outputs = _WEIGHT_BYTES // (_INPUTS * kind.itemsize)
    weight = zeros((outputs, _INPUTS), kind, device).fill_(1)
    row_flops = 2 * weight.numel()
    if quantised:
        product = bind_product(PRODUCT, dtype, native=device.type == "cpu" and kernels() is not None)
        assert product is not None
        scales = torch.ones(outputs, device=device)
        outliers = torch.empty(0, outputs, dtype=torch.bfloat16, device=device)
        columns = torch.empty(0, dtype=torch.int64, device=device)
        return lambda x: product(x, weight, scales, outliers, columns, None), weight.nbytes, row_flops
    if device.type == "cpu" and packs(dtype):
        packed = PackedProduct(dtype)
        return lambda x: packed(x, weight, None, outputs), weight.nbytes, row_flops
    return lambda x: torch.nn.functional.linear(x, weight), weight.nbytes, row_flops


def _attention(device: torch.device, dtype: torch.dtype, shape: HeadShape, block_size: int) -> Callable[[], object]:
    """A token of each of some sequences, and a chunk of a prompt, twice as many: as a step has them."""
    each = -(-_POSITIONS // block_size)
    context = context_for(block_size, dtype, device)
    node = bind("attention", shape, (_SEQUENCES + 1) * each, context, dtype, device)
    work = []
    for i in range(_SEQUENCES + 1):
        blocks = list(range(i * each, (i + 1) * each))
        sequence = Tokens(i, [0] * _POSITIONS, _POSITIONS, Sampling(), 0, 1, blocks=blocks, slot=i)
        count = 1 if i < _SEQUENCES else _CHUNK
        work.append(Work(sequence, _POSITIONS - count, count, True))
    context.set(Step.unpack(pack_step(work, block_size)))
    node.k_BGDP.fill_(0.1)
    node.v_BGPE.fill_(0.1)
    q = torch.ones(1, shape.heads, len(_SEEN), shape.key_width, dtype=dtype, device=device)
    k = torch.ones(1, shape.kv_heads, len(_SEEN), shape.key_width, dtype=dtype, device=device)
    v = torch.ones(1, shape.kv_heads, len(_SEEN), shape.value_width, dtype=dtype, device=device)
    return lambda: node(q, k, v, None, shape.key_width**-0.5, True, 0, 0.0, 0.0)


def _seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The shortest of a few of each, in turn: what slows a machine down for a while is in all of them."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(_TRIES):
        for call, times in zip(calls, took, strict=True):
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return [min(times) for times in took]
