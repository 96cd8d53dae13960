"""How fast devices serve, and what plans make of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nesa_ray.cluster.topology import Device, Link, Topology
from nesa_ray.graph.graph import Graph, Node
from nesa_ray.graph.split import ATTENTION
from nesa_ray.serving.blueprint import capture_served, plan_for, served_costs
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.kv_cache import HeadShape
from nesa_ray.serving.pace import MESSAGE_S, MESSAGE_SHARE, Pace, measure, paced, stated

SHAPE = HeadShape(4, 2, 16, 16)
PACE = Pace.of(bytes_per_s=10.0, flops_per_s=100.0, attention_flops_per_s=20.0)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_is_measured(dtype: torch.dtype, quantised: bool) -> None:
    found = measure("cpu", dtype, quantised, SHAPE, 16)
    assert 1e7 < found.attention_flops_per_s < 1e13
    flops, seconds = zip(*found.products, strict=True)
    assert list(flops) == sorted(flops)
    assert 1e8 < 1 / seconds[0] < 1e12
    assert seconds[-1] > seconds[0]


def test_a_product_is_read_and_then_multiplied_with() -> None:
    product = Node(id=0, op="aten.linear.default", flops=300.0, param_bytes=40.0, access_bytes=50.0)
    assert PACE.seconds(product) == pytest.approx(40 / 10 + 10 / 5 / 10 + 300 / 100)
    embedding = Node(id=0, op="aten.embedding.default", param_bytes=1e9, access_bytes=20.0)
    assert PACE.seconds(embedding) == pytest.approx(20 / 10)
    assert PACE.seconds(Node(id=0, op=ATTENTION, flops=40.0, access_bytes=50.0)) == pytest.approx(40 / 20)


def test_products_are_straight_between_what_was_measured_and_beyond() -> None:
    pace = Pace(((2.0, 1.0), (4.0, 2.0), (8.0, 6.0)), 1.0)

    def seconds(flops: float) -> float:
        return pace.seconds(Node(id=0, op="aten.mm.default", flops=10 * flops, param_bytes=10, access_bytes=10)) / 10

    assert [seconds(f) for f in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)] == [0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert pace.seconds(Node(id=0, op="aten.mul.Tensor", flops=3.0)) == pytest.approx(3.0)  # as a further row


def test_a_kinds_seconds_are_its_fastest_devices_and_others_are_slower() -> None:
    graph = Graph((Node(id=0, flops=100.0), Node(id=1, op=ATTENTION, flops=20.0)), ((0, 1),))
    devices = tuple(Device(id=f"d{i}", kind=k, node="n") for i, k in enumerate(("cpu", "cpu", "gpu")))
    topology = Topology(devices, Link(1e9, 1e-6), {frozenset(("n", "m")): Link(1e6, 0.02)})
    half = Pace.of(5.0, 50.0, 10.0)
    seconds, given = paced(graph, topology, {"d0": half, "d1": PACE, "d2": half})
    assert seconds == {n: {"cpu": pytest.approx(1.0), "gpu": pytest.approx(2.0)} for n in (0, 1)}
    assert [d.speed for d in given.devices] == pytest.approx([0.5, 1.0, 1.0])
    assert given.default == Link(
        1e9, pytest.approx(MESSAGE_SHARE * 1.0)
    )  # stages of 2, 4 and 4 s for the whole: of 1 s
    assert given.pairs[frozenset(("n", "m"))] == Link(1e6, 0.02)


def test_a_message_takes_something_however_short_the_step() -> None:
    graph = Graph((Node(id=0, flops=1e-3),), ())
    topology = Topology((Device(id="d", kind="cpu", node="n"),), Link(1e9, 1e-6))
    assert paced(graph, topology, {"d": PACE})[1].default == Link(1e9, MESSAGE_S)
    assert paced(replace(graph, nodes=(Node(id=0),)), topology, {"d": PACE})[1].devices[0].speed == 1.0


def test_a_described_device_is_as_fast_as_is_said_of_it() -> None:
    device = Device(id="d", kind="cpu", node="n", flops_per_s=1e11, memory_bytes_per_s=1e10)
    found = stated(Topology((device,)))
    assert found is not None
    assert found["d"] == Pace.of(1e10, 1e11, 2e10)
    assert stated(Topology((device, replace(device, id="e", flops_per_s=0.0)))) is None


def test_a_plan_for_serving_weighs_reading_multiplying_and_the_context(tmp_path: Path) -> None:
    """The stages of equal devices are even by the pace, and attention counts for more where contexts are long."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=320, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    topology = Topology(tuple(Device(id=f"d{i}", kind="cpu", node="n") for i in range(2)), Link(1e10, 1e-6))
    pace = Pace.of(1e9, 1e10, 1e9)

    def planned(context: int) -> tuple[list[float], float]:
        served = ServeConfig(model=str(tmp_path), context=context, stages=2)
        captured = capture_served(served)
        costs = served_costs(served, captured, topology, lambda *_: {"d0": pace, "d1": pace})
        plan = plan_for(served, captured, topology, costs=costs)
        whole = math.fsum(pace.seconds(n) for n in captured.graph.nodes)
        assert math.fsum(s.compute_s for s in plan.stages) == pytest.approx(whole)
        attention = math.fsum(pace.seconds(n) for n in captured.graph.nodes if n.op == ATTENTION)
        return [s.compute_s for s in plan.stages], attention / whole

    (a, b), short = planned(64)
    assert a == pytest.approx(b, rel=0.15)
    (a, b), long = planned(4096)
    assert a == pytest.approx(b, rel=0.15)
    assert short < 0.2 < 0.5 < long
