"""The front door: what may be asked, what is answered, what is refused."""

import json
import re
from dataclasses import replace

import pytest

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import Infeasible, InvalidInput
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.costing import derive_costs, optimizer_factor, reduction_factor
from nesa_ray.planning.explain import explain
from nesa_ray.planning.partition import pareto, partition, planned_costs, warm_up
from nesa_ray.planning.picture import html


def chain(n: int = 12, **fields: float) -> Graph:
    node = {"flops": 1e9, "param_bytes": 4e6, "output_bytes": 1e5, "saved_bytes": 1e5, **fields}
    nodes = [{"id": i, "name": f"layer{i}", **node} for i in range(n)]
    return Graph.from_dict({"nodes": nodes, "edges": [[i, i + 1] for i in range(n - 1)]})


def cluster(*flops_per_s: float, memory_bytes: float = 1e9, per_host: int = 2, bytes_per_s: float = 1e9) -> Topology:
    devices = [
        {"id": f"d{i}", "kind": "cpu", "node": f"h{i // per_host}", "memory_bytes": memory_bytes, "flops_per_s": f}
        for i, f in enumerate(flops_per_s)
    ]
    return Topology.from_dict({"devices": devices, "links": {"default": {"bytes_per_s": bytes_per_s}}})


def test_unequal_devices_get_work_by_their_speed() -> None:
    plan = partition(chain(12), cluster(1e10, 2e10, bytes_per_s=1e12))
    nodes = {s.devices[0]: len(s.nodes) for s in plan.stages}
    assert nodes == {"d0": 4, "d1": 8}
    assert plan.proved_optimal
    assert plan.gap < 1e-6


def test_stages_of_replicas() -> None:
    plan = partition(chain(), cluster(1e10, 2e10, 3e10, 4e10), stages=2, replicas=2)
    assert sorted(len(s.devices) for s in plan.stages) == [2, 2]
    assert len(set(plan.devices)) == 4
    assert plan.bottleneck_s == pytest.approx(max(s.cost_s for s in plan.stages) / 2)
    assert plan.lower_bound_s <= plan.bottleneck_s


def test_replicas_pay_for_their_gradients_in_training() -> None:
    topology = cluster(1e10, 1e10, 1e10, 1e10)
    plan = partition(chain(), topology, mode="training", replicas=4, micro_batches=2)
    reduced = reduction_factor(0, 4, 2) * 12 * 4e6 / 1e9
    assert [s.sync_s for s in plan.stages] == [pytest.approx(reduced)]
    assert plan.bottleneck_s == pytest.approx(3 * 12 * 0.1 / 4 + reduced)
    assert partition(chain(), topology, mode="inference", replicas=4).stages[0].sync_s == 0


def test_auto_chooses_replicas_where_links_are_fast_and_stages_where_they_are_slow() -> None:
    small = chain(3, param_bytes=4.0, output_bytes=1e7)
    assert partition(small, cluster(1e10, 1e10), mode="training", replicas="auto").replicas == 2
    heavy = chain(12, param_bytes=4e8, output_bytes=4.0)
    slow = cluster(1e10, 1e10, memory_bytes=1e12, bytes_per_s=1e8)
    assert partition(heavy, slow, mode="training", replicas="auto").replicas == 1


def test_one_device_where_links_cost_more_than_they_bring() -> None:
    plan = partition(chain(4), cluster(1e10, 1e10, bytes_per_s=1e3))
    assert len(plan.stages) == 1


def test_latency_puts_towers_side_by_side() -> None:
    nodes = [{"id": i, "flops": 1e9, "output_bytes": 1e3} for i in ("in", "join")]
    nodes += [{"id": f"{t}{i}", "flops": 1e9, "output_bytes": 1e3} for t in "ab" for i in range(20)]
    edges = [[f"{t}{i}", f"{t}{i + 1}"] for t in "ab" for i in range(19)]
    edges += [["in", "a0"], ["in", "b0"], ["a19", "join"], ["b19", "join"]]
    graph = Graph.from_dict({"nodes": nodes, "edges": edges})
    plan = partition(graph, cluster(1e10, 1e10, 1e10, 1e10), objective="latency", max_seconds=10)
    one_device = 42 * 0.1
    assert plan.latency_s < 0.55 * one_device
    assert plan.latency_s >= plan.lower_bound_s == pytest.approx(2.2)
    serial = partition(graph, cluster(1e10), objective="latency")
    assert serial.latency_s == pytest.approx(one_device)
    assert serial.proved_optimal


def test_pareto_plans_trade_one_for_the_other() -> None:
    front = pareto(chain(), cluster(1e10, 1e10, 1e10), max_seconds=3)
    assert [p.bottleneck_s for p in front] == sorted(p.bottleneck_s for p in front)
    assert [p.latency_s for p in front] == sorted((p.latency_s for p in front), reverse=True)
    assert len(front) >= 2


def test_training_costs_are_derived_in_one_place() -> None:
    graph = chain(2)
    node = derive_costs(graph, "training", in_flight=3).nodes[0]
    assert (node.flops, node.output_bytes) == (3e9, 2e5)
    assert node.memory_bytes == 4 * 4e6 + 3 * 1e5
    assert derive_costs(graph, "training", in_flight=3, recompute=True).nodes[0].flops == 4e9
    assert derive_costs(graph, "inference").nodes[0].memory_bytes == 4e6
    caching = graph.with_nodes(replace(n, cache_bytes=300) for n in graph.nodes)
    assert derive_costs(caching, "inference", cache_tokens=10).nodes[0].memory_bytes == 4e6 + 10 * 300
    assert derive_costs(caching, "training").nodes[0].memory_bytes == 4 * 4e6 + 1e5
    assert derive_costs(chain(2, memory_bytes=7), "training").nodes[0].memory_bytes == 7
    stated = Graph.from_dict({"nodes": [{"id": 0, "compute_s": {"cpu": 1}}]})
    assert derive_costs(stated, "training") is stated
    assert [optimizer_factor(z, 4) for z in range(4)] == [4, 2.75, 2.75, 3.25]


def test_a_margin_leaves_memory_free() -> None:
    topology = cluster(1e10, 1e10, memory_bytes=4e7)
    plan = partition(chain(12), topology, memory_margin=0.3)
    assert all(s.memory_bytes <= 0.7 * 4e7 for s in plan.stages)
    with pytest.raises(Infeasible, match="all devices together have"):
        partition(chain(12), topology, memory_margin=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3}, "stages: 3 stages of 1 devices need 3 devices, the cluster has 2"),
        ({"stages": 2, "replicas": 2}, "stages: 2 stages of 2 devices need 4 devices, the cluster has 2"),
        ({"replicas": 3}, "stages: 1 stages of 3 devices need 3 devices, the cluster has 2"),
    ],
)
def test_too_few_devices(options: dict, message: str) -> None:
    with pytest.raises(Infeasible, match=re.escape(message)):
        partition(chain(), cluster(1e10, 1e10), **options)


def test_more_stages_than_nodes() -> None:
    with pytest.raises(Infeasible, match="2 stages asked for, the graph has 1 nodes"):
        partition(chain(1), cluster(1e10, 1e10), stages=2)


def test_memory_that_cannot_fit_however_it_is_cut() -> None:
    graph = chain(3, memory_bytes=60)
    with pytest.raises(Infeasible, match="memory: no cut of the graph into up to 2 stages fits the devices"):
        partition(graph, cluster(1e10, 1e10, memory_bytes=100))


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "speed"}, {"mode": "dreaming"}, {"stages": 0}, {"stages": True}, {"replicas": 0},
        {"replicas": "some"}, {"max_seconds": 0}, {"max_seconds": float("nan")}, {"memory_margin": 1},
        {"memory_margin": -0.1}, {"zero": 4}, {"micro_batches": 0},
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(options: dict) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options))):
        partition(chain(), cluster(1e10, 1e10), **options)


@pytest.mark.alone
def test_time_is_kept() -> None:
    graph = chain(400)
    for _ in range(3):  # others may use this machine: one quiet moment is enough
        plan = partition(graph, cluster(*(1e10 + 1e9 * i for i in range(12))), max_seconds=2)
        if plan.planning_s < 4:
            break
    assert plan.planning_s < 4
    plan.check(planned_costs(graph, cluster(*[1e10] * 12), "inference"), cluster(*(1e10 + 1e9 * i for i in range(12))))


def test_an_explanation_names_what_bounds_the_plan() -> None:
    topology = cluster(1e10, 2e10)
    plan = partition(chain(), topology)
    found = explain(plan, chain(), planned_costs(chain(), topology, "inference"), topology, seconds=3)
    assert found.parts["compute"] > 0.9
    assert found.alternatives[0].ratio < 1
    assert any("one more device like d1" in line for line in found.lines())


def test_a_picture_stands_alone() -> None:
    topology = cluster(1e10, 2e10)
    plan = partition(chain(), topology)
    page = html(plan, planned_costs(chain(), topology, "inference"), topology)
    assert page.count("<svg") == 2
    assert "http" not in page
    assert all(f"stage {s.id}" in page for s in plan.stages)
    json.dumps(plan.to_dict())


def test_warm_up() -> None:
    warm_up()
