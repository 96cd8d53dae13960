"""Interleaved stages: they go round the devices, share them evenly and fit their memory."""

import pytest

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible
from nesa_ray.graph.graph import Graph, Node
from nesa_ray.planning.interleave import interleave
from nesa_ray.planning.partition import partition
from nesa_ray.planning.plan import Plan, stage_graph, topological_stages


def chain(n: int, memory_bytes: float | list[float] = 1.0) -> Graph:
    """n nodes of 6 flops in a row."""
    memory = memory_bytes if isinstance(memory_bytes, list) else [memory_bytes] * n
    nodes = [Node(id=i, flops=6.0, memory_bytes=m, output_bytes=1.0) for i, m in enumerate(memory)]
    return Graph(tuple(nodes), tuple((i, i + 1) for i in range(n - 1)))


def devices(*flops_per_s: float, memory_bytes: float = 100.0) -> Topology:
    return Topology(
        tuple(
            Device(id=f"d{i}", kind="cpu", node="x", flops_per_s=f, memory_bytes=memory_bytes)
            for i, f in enumerate(flops_per_s)
        )
    )


def cut(graph: Graph, topology: Topology, per_device: int, **options) -> tuple[Plan, Plan]:
    plan = partition(graph, topology, stages=len(topology.devices), max_seconds=2, **options)
    return plan, interleave(plan, graph, topology, per_device)


@pytest.mark.parametrize(("speeds", "per_device"), [((1, 1), 2), ((1, 1, 1, 1), 3), ((2, 1), 2), ((3, 1, 2), 2)])
def test_stages_go_round_the_devices_in_proportion_to_their_speed(speeds: tuple, per_device: int) -> None:
    graph = chain(sum(speeds) * per_device * 2)
    plan, found = cut(graph, devices(*speeds), per_device)
    assert [s.devices for s in found.stages] == [s.devices for s in plan.stages] * per_device
    assert sorted(n for s in found.stages for n in s.nodes) == sorted(graph.node)
    quotient = stage_graph(graph, found.stage_of)
    assert topological_stages(quotient) == list(range(len(found.stages)))
    assert {s.compute_s for s in found.stages} == {12.0}
    assert found.bottleneck_s == pytest.approx(12.0 * per_device, rel=1e-3)


def test_replicas_share_each_stage() -> None:
    plan = partition(chain(8), devices(1, 1, 1, 1), stages=2, replicas=2, max_seconds=2)
    found = interleave(plan, chain(8), devices(1, 1, 1, 1), 2)
    assert [s.devices for s in found.stages] == [s.devices for s in plan.stages] * 2
    assert {len(s.nodes) for s in found.stages} == {2}


def test_a_device_holds_the_sum_of_its_stages() -> None:
    """The fastest cut, two nodes a stage, would put 3 + 3 bytes on a device that has 5."""
    graph = chain(8, [1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 0.5, 0.5])
    plan, found = cut(graph, devices(1, 1, memory_bytes=5.0), 2)
    for i in range(2):
        assert sum(s.memory_bytes for s in found.stages[i::2]) <= 5.0
    with pytest.raises(Infeasible, match="2 × 2 stages that fit the memory"):
        interleave(plan, graph, devices(1, 1, memory_bytes=3.9), 2)


def test_too_few_nodes() -> None:
    with pytest.raises(Infeasible, match="2 × 3 stages"):
        cut(chain(5), devices(1, 1), 3)
