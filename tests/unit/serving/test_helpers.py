"""Cores lent to a stage's kernels: the same bits, whoever computes which part."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.planning.plan import Plan, Stage
from nesa_ray.serving.blueprint import _lent, capture_served, draw
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.kv_cache import HeadShape
from nesa_ray.serving.native.attention import NativeAttention, NativeContext
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.helpers import Helpers
from nesa_ray.serving.native.products import Int8Product, PackedProduct, packed
from nesa_ray.serving.quantised import quantise
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Sequence, Work
from nesa_ray.serving.stages import LocalStages
from nesa_ray.serving.step import Step, pack_step
from tests.unit.serving.conftest import Model, cut

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no compiler")
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def helpers() -> Helpers:
    return Helpers([CORES[0], CORES[-1]])


def products(dtype: torch.dtype) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    weight = torch.randn(515, 200)
    panels, q = packed(weight.to(dtype)), quantise(weight)
    plain, int8 = PackedProduct(dtype), Int8Product(dtype)
    return [
        lambda x: plain(x, panels, None, 515),
        lambda x: int8(x, q.values, q.scales, q.outliers, q.columns, None),
    ]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 20])
def test_products_are_the_same(dtype: torch.dtype, rows: int, helpers: Helpers) -> None:
    torch.manual_seed(rows)
    for product in products(dtype):
        given = [torch.randn(rows, 200).to(dtype) for _ in range(40)]
        alone = [product(x) for x in given]
        for _ in range(5):
            with helpers:
                together = [product(x) for x in given]
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        assert torch.equal(product(given[0]), alone[0])  # and without them again


@needs_kernels
def test_attention_is_the_same(helpers: Helpers) -> None:
    torch.manual_seed(0)
    context = NativeContext(16)
    node = NativeAttention("a", HeadShape(8, 4, 32, 32), 8, context, torch.float32, torch.device("cpu"))
    sequence = Sequence(0, [0] * 100, 100, Sampling(), 0, 1, blocks=list(range(7)), slot=0)
    got = []
    for helped in (False, True, True):
        generator = torch.Generator().manual_seed(1)
        parts = []
        for start in (0, 60, 99):
            count = {0: 60, 60: 39, 99: 1}[start]
            context.set(Step.unpack(pack_step([Work(sequence, start, count, False)], 16)))
            q = torch.randn(1, 8, count, 32, generator=generator)
            k, v = (torch.randn(1, 4, count, 32, generator=generator) for _ in range(2))
            arguments = (q, k, v, None, 0.2, True, 0, 0.0, 0.0)
            if helped:
                with helpers:
                    parts.append(node(*arguments))
            else:
                parts.append(node(*arguments))
        got.append(torch.cat(parts, 2))
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def test_without_cores_nothing_helps() -> None:
    with Helpers(()):
        pass


def test_a_step_says_whether_it_is_alone() -> None:
    sequence = Sequence(0, [5], 1, Sampling(), 0, 1, blocks=[0], slot=0)
    work = [Work(sequence, 0, 1, True)]
    assert [Step.unpack(pack_step(work, 4, alone=a)).alone for a in (False, True)] == [False, True]
    assert not Step.unpack(pack_step(work, 4)).alone


def test_cores_are_lent_by_the_other_stages_of_a_host() -> None:
    places = {"a0": ("a", (0,)), "a1": ("a", (1,)), "a2": ("a", (0, 2)), "b0": ("b", (0,)), "c": ("c", ())}
    devices = tuple(Device(id=d, kind="cpu", node=node, cores=cores) for d, (node, cores) in places.items())
    stages = tuple(Stage(id=i, devices=(d,), nodes=(i,)) for i, d in enumerate(places))
    plan = Plan(objective="throughput", bottleneck_s=1.0, latency_s=1.0, lower_bound_s=1.0, stages=stages)
    lent = [_lent(plan, Topology(devices), s) for s in range(5)]
    assert lent == [(1, 2), (0, 2), (1,), (), ()]
    assert _lent(plan, None, 0) == ()
    assert _lent(plan, Topology(devices[1:]), 0) == ()


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_stream_is_helped_and_several_are_not(
    dtype: str, model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(model=str(model("llama").directory), dtype=dtype, block_size=4, cache_bytes=1 << 20)
    captured = capture_served(config)
    blueprint = draw(config, captured, cut(captured))
    began: list[int] = []
    begin = Helpers.__enter__
    monkeypatch.setattr(Helpers, "__enter__", lambda self: (began.append(1), begin(self))[1])
    tokens = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for lent in ((), tuple(CORES)):
            specs = tuple(replace(s, lent=lent) for s in blueprint.specs)
            helped = replace(blueprint, specs=specs)
            with Engine(config, blueprint=helped, stages=LocalStages(helped)) as engine:
                tokens.append(engine.generate([5, 6, 7], temperature=0, max_tokens=12).token_ids)
                assert len(began) >= 10
                began.clear()
    finally:
        torch.set_num_threads(threads)
    assert tokens[0] == tokens[1]
