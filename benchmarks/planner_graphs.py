"""Made-up graphs and clusters for the sizes that public profiles don't reach, and real models from their shapes."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

from nesa_ray.cluster.topology import Topology
from nesa_ray.graph.graph import Graph

KINDS = {"fast": 1.0, "mid": 2.0, "slow": 4.0}


class _Builder:
    """Nodes numbered as they are added."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes: list[dict[str, Any]] = []
        self.edges: list[list[int]] = []

    def add(self, seconds: float, output_bytes: float, memory_bytes: float, *inputs: int) -> int:
        """One node; its time on each kind of device."""
        i = len(self.nodes)
        self.nodes.append(
            {
                "id": i,
                "compute_s": {kind: seconds * factor for kind, factor in KINDS.items()},
                "output_bytes": output_bytes,
                "memory_bytes": memory_bytes,
                "param_bytes": memory_bytes,
            }
        )
        self.edges += [[j, i] for j in inputs]
        return i

    def jitter(self, value: float) -> float:
        return value * (0.75 + 0.5 * self.random.random())

    def graph(self, name: str) -> Graph:
        return Graph.from_dict({"name": name, "nodes": self.nodes, "edges": self.edges})


def cells(count: int = 18, seed: int = 0) -> Graph:
    """NASNet-like: `count` cells of five pairs of branches, each reading the two cells before it (994 nodes for 18)."""
    b = _Builder(seed)
    size, width = 1.0, 1.0

    def layer(seconds: float, x: int, *more: int, scale: float = 1.0) -> int:
        out = 3e7 * size * width
        return b.add(b.jitter(seconds) * size * width, out * scale, out * scale, x, *more)

    def separable(x: int) -> int:
        for _ in range(2):
            for seconds in (3e-4, 2e-3, 1e-3, 5e-4):
                x = layer(seconds, x)
        return x

    def adapt(x: int) -> int:
        return layer(5e-4, layer(2e-3, layer(3e-4, x, scale=3)))

    x = b.add(b.jitter(4e-3), 6e7, 1e7)
    before = x = b.add(b.jitter(1e-3), 6e7, 1e6, x)
    for c in range(count):
        if c in (count // 3, 2 * count // 3):
            size, width = size / 4, width * 2
        here, there = adapt(x), adapt(before)
        outs = [
            layer(2e-4, separable(here), here),
            layer(2e-4, separable(there), separable(here)),
            layer(2e-4, layer(1e-3, here), there),
            layer(2e-4, layer(1e-3, there), layer(1e-3, there)),
            layer(2e-4, separable(there), separable(there)),
        ]
        before, x = x, layer(3e-4, outs[0], *outs[1:], scale=5)
    b.add(2e-3, 4e3, 1e7, layer(3e-4, x))
    return b.graph(f"cells{count}")


def decoder(layers: int = 80, per_layer: int = 125, seed: int = 0) -> Graph:
    """One block repeated: three branches, a residual, a chain, a residual; a mask that every layer reads."""
    b = _Builder(seed)
    weight = [b.random.random() ** 3 for _ in range(per_layer)]
    residual = b.add(1e-4, 1e6, 1e7)
    mask = b.add(1e-6, 1e4, 0)
    for layer in range(layers):
        branches = []
        for branch in range(3):
            x = residual
            for k in range(per_layer // 6):
                x = b.add(1e-4 * weight[20 * branch + k], 1e6, 1e6, x, *([mask] if k == 3 else []))
            branches.append(x)
        middle = x = b.add(1e-5, 1e6, 0, b.add(2e-4, 1e6, 4e6, *branches), residual)
        while len(b.nodes) < 1 + (layer + 1) * per_layer:
            x = b.add(1e-4 * weight[len(b.nodes) % per_layer], 3e6, 2e6, x)
        residual = b.add(1e-5, 1e6, 0, x, middle)
    return b.graph(f"decoder{layers}")


def equal_devices(graph: Graph, count: int, *, bytes_per_s: float, spare: float = 1.5, per_host: int = 8) -> Topology:
    """`count` devices of one kind, with `spare` times the memory that an even share of the graph needs."""
    total = sum(n.memory_bytes for n in graph.nodes)
    devices = [
        {"id": f"gpu{i}", "kind": "fast", "node": f"host{i // per_host}", "memory_bytes": spare * total / count}
        for i in range(count)
    ]
    return Topology.from_dict({"devices": devices, "links": {"default": {"bytes_per_s": bytes_per_s}}})


def unequal_devices(graph: Graph, count: int, seed: int = 1, per_host: int = 10) -> Topology:
    """`count` devices of three speeds and memories on hosts of ten; 1 Gbyte/s between hosts, 200 within."""
    rng = random.Random(seed)
    share = sum(n.memory_bytes for n in graph.nodes) / count
    devices = [
        {
            "id": f"gpu{i}",
            "kind": rng.choice(list(KINDS)),
            "node": f"host{i // per_host}",
            "memory_bytes": max(share, 1.2e7) * rng.choice([1.5, 3, 6]),
        }
        for i in range(count)
    ]
    hosts = -(-count // per_host)
    pairs = [
        {"a": f"host{i}", "b": f"host{j}", "bytes_per_s": 1e9, "latency_s": 1e-4}
        for i in range(hosts)
        for j in range(i)
    ]
    default = {"bytes_per_s": 2e11, "latency_s": 1e-6}
    return Topology.from_dict({"devices": devices, "links": {"default": default, "pairs": pairs}})


@cache
def real_model(name: str) -> Graph:
    """A Hugging Face model captured from its shape, without weights, at one sequence of 128 tokens, for inference."""
    from transformers import LlamaConfig, Qwen3MoeConfig, T5Config

    from nesa_ray.graph.models import capture_ref
    from nesa_ray.planning.costing import derive_costs

    configs: dict[str, Callable[[], Any]] = {
        "llama3_70b": lambda: LlamaConfig(
            vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
        ),
        "qwen3_moe_30b": lambda: Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
            dtype="bfloat16",
        ),
        "t5_11b": lambda: T5Config(
            vocab_size=32128, d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_decoder_layers=24, num_heads=128,
            architectures=["T5ForConditionalGeneration"],
        ),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        configs[name]().save_pretrained(directory)
        return derive_costs(capture_ref(directory, batch=1, tokens=128).graph, "inference")


def eight_gpus() -> Topology:
    """(a) Eight unequal GPUs on three hosts: four of 80 GB, two of 48 GB, two of 24 GB."""
    kinds = [(4, 8e10, 3e14, 2e12), (2, 4.8e10, 1.5e14, 8e11), (2, 2.4e10, 1.6e14, 1e12)]
    devices = [
        _gpu(f"host{h}", f"host{h}gpu{i}", memory, flops, bandwidth)
        for h, (count, memory, flops, bandwidth) in enumerate(kinds)
        for i in range(count)
    ]
    ends = [(0, 1, 3e9, 5e-5), (0, 2, 1.25e9, 1e-4), (1, 2, 1.25e9, 1e-4)]
    pairs = [{"a": f"host{a}", "b": f"host{b}", "bytes_per_s": w, "latency_s": s} for a, b, w, s in ends]
    default = {"bytes_per_s": 2.5e10, "latency_s": 1e-5}
    return Topology.from_dict({"devices": devices, "links": {"default": default, "pairs": pairs}})


def consumer_devices(count: int, per_home: int, seed: int = 0) -> Topology:
    """(b), (c) Devices of 8 to 24 GB, `per_home` at each place; 1 Gbit/s within, 100 Mbit to 1 Gbit between."""
    rng = random.Random(seed)
    kinds = [(8e9, 2e13, 2.5e11), (1.2e10, 3e13, 3.6e11), (1.6e10, 5e13, 5e11), (2.4e10, 8e13, 9e11)]
    devices = [_gpu(f"home{i // per_home}", f"gpu{i}", *rng.choice(kinds)) for i in range(count)]
    homes = -(-count // per_home)
    pairs = [
        {
            "a": f"home{i}",
            "b": f"home{j}",
            "bytes_per_s": rng.choice([1.25e7, 2.5e7, 6.25e7, 1.25e8]),
            "latency_s": rng.choice([0.005, 0.02, 0.05]),
        }
        for i in range(homes)
        for j in range(i)
    ]
    default = {"bytes_per_s": 1.25e8, "latency_s": 1e-3}
    return Topology.from_dict({"devices": devices, "links": {"default": default, "pairs": pairs}})


def _gpu(node: str, name: str, memory: float, flops: float, bandwidth: float) -> dict[str, Any]:
    return {
        "id": name,
        "kind": "gpu",
        "node": node,
        "memory_bytes": memory,
        "flops_per_s": flops,
        "memory_bytes_per_s": bandwidth,
    }
