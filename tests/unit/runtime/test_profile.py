"""Measured costs reach the plan, scaled to each device's speed."""

import pytest
from transformers import LlamaConfig

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import InvalidConfig
from nesa_ray.graph.models import capture_ref
from nesa_ray.planning.partition import partition, planned_costs
from nesa_ray.runtime.profile import measure_here


@pytest.fixture
def captured(tmp_path, monkeypatch):
    monkeypatch.setenv("NESA_RAY_CACHE", str(tmp_path / "cache"))
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=500).save_pretrained(tmp_path)  # fmt: skip
    return capture_ref(tmp_path, batch=2, tokens=32)


def cluster(*flops: float, kind: str = "cpu") -> Topology:
    devices = [
        {"id": f"d{i}", "kind": kind, "node": f"h{i}", "memory_bytes": 1e9, "flops_per_s": f, "cores": [0]}
        for i, f in enumerate(flops)
    ]
    return Topology.from_dict({"devices": devices, "links": {"default": {"bytes_per_s": 1e9}}})


def test_a_slower_device_takes_longer_by_its_speed(captured, tmp_path):
    seconds, topology = measure_here(captured, cluster(4e10, 1e10), "training")
    fast, slow = topology.devices
    assert fast.speed == pytest.approx(4 * slow.speed)
    assert set(seconds) == {n.id for n in captured.graph.nodes}
    assert list((tmp_path / "cache" / "measured").iterdir())
    plan = partition(captured.graph, topology, mode="training", stages=2, seconds=seconds)
    for stage in plan.stages:
        speed = topology.device[stage.devices[0]].speed
        assert stage.compute_s == pytest.approx(sum(seconds[n]["cpu"] for n in stage.nodes) / speed)
    plan.check(planned_costs(captured.graph, topology, "training", stages=2, seconds=seconds), topology)
    parts = {s.devices[0]: sum(seconds[n]["cpu"] for n in s.nodes) for s in plan.stages}
    assert parts["d0"] > 2 * parts["d1"]


def test_memory_is_still_derived(captured):
    seconds, topology = measure_here(captured, cluster(4e10), "training")
    measured = planned_costs(captured.graph, topology, "training", stages=1, seconds=seconds)
    derived = planned_costs(captured.graph, topology, "training", stages=1)
    assert [n.memory_bytes for n in measured.nodes] == [n.memory_bytes for n in derived.nodes]
    assert Topology.from_dict(topology.to_dict()) == topology


def test_a_kind_that_is_not_here(captured):
    with pytest.raises(InvalidConfig, match="devices of kind 'tpu', this machine has none"):
        measure_here(captured, cluster(1e10, kind="tpu"), "inference")


def test_attention_nodes_say_what_a_token_keeps(captured):
    keeping = [n.cache_bytes for n in captured.graph.nodes if n.cache_bytes]
    assert keeping == [2 * (16 + 16) * 4] * 2  # two layers of two key-value heads of sixteen, float32
    room = sum(n.param_bytes for n in captured.graph.nodes) * 1.5
    devices = [{"id": i, "node": i, "flops_per_s": 1e9, "memory_bytes": room} for i in "ab"]
    small = Topology.from_dict({"devices": devices, "links": {"default": {"bytes_per_s": 1e6, "latency_s": 0.01}}})
    assert len(partition(captured.graph, small, objective="latency").stages) == 1
    assert len(partition(captured.graph, small, objective="latency", cache_tokens=int(room / 512)).stages) == 2
