"""What holds of every plan, whatever the graph."""

import random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nesa_ray.errors import Infeasible
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.partition import partition
from nesa_ray.planning.plan import Plan, cost_stages
from tests.unit.planning.random_problems import random_graph, random_topology

SETTINGS = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SEEDS = st.integers(0, 10**9)


def problem(seed: int):
    rng = random.Random(seed)
    graph = random_graph(rng, rng.randint(1, 14), kinds=("gpu", "cpu"), backward=rng.random() < 0.4)
    topology = random_topology(rng, rng.randint(1, 4), unequal_links=rng.random() < 0.5, tight=20, kinds=("gpu", "cpu"))
    return graph, topology


def planned(graph, topology, **options) -> Plan:
    try:
        return partition(graph, topology, max_seconds=8, **options)
    except Infeasible:
        assume(False)
        raise AssertionError from None


@SETTINGS
@given(SEEDS)
def test_a_plan_is_valid_and_costs_what_it_says(seed: int) -> None:
    graph, topology = problem(seed)
    plan = planned(graph, topology)
    plan.check(graph, topology)
    again = cost_stages(graph, topology, plan.stages)
    assert max(s.period_s for s in again) == pytest.approx(plan.bottleneck_s, rel=1e-12)
    assert plan.lower_bound_s <= plan.bottleneck_s
    assert Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()


@SETTINGS
@given(SEEDS)
def test_a_seed_gives_one_plan(seed: int) -> None:
    graph, topology = problem(seed)
    plans = [planned(graph, topology, seed=seed % 7) for _ in range(2)]
    assert plans[0].stages == plans[1].stages


@SETTINGS
@given(SEEDS)
def test_names_and_order_of_nodes_change_nothing(seed: int) -> None:
    graph, topology = problem(seed)
    rng = random.Random(seed)
    to = {n.id: f"m{i}" for i, n in enumerate(rng.sample(list(graph.nodes), len(graph.nodes)))}
    nodes = [{**n.to_dict(), "id": to[n.id]} for n in rng.sample(list(graph.nodes), len(graph.nodes))]
    edges = [[to[u], to[v]] for u, v in rng.sample(list(graph.edges), len(graph.edges))]
    renamed = Graph.from_dict({"nodes": nodes, "edges": edges})
    one, other = planned(graph, topology), planned(renamed, topology)
    assert other.bottleneck_s == pytest.approx(one.bottleneck_s, rel=1e-6)
    assert one.proved_optimal == other.proved_optimal


@SETTINGS
@given(SEEDS, st.floats(0.1, 10))
def test_a_slower_world_is_slower_by_as_much(seed: int, factor: float) -> None:
    graph, topology = problem(seed)
    slower = Graph.from_dict(
        {
            **graph.to_dict(),
            "nodes": [
                {**n.to_dict(), "compute_s": {k: v * factor for k, v in n.compute_s.items()}} for n in graph.nodes
            ],
        }
    )
    first = planned(graph, topology)
    second = planned(slower, topology)
    assert min(1, factor) * first.bottleneck_s * (1 - 1e-6) <= second.bottleneck_s
    assert second.bottleneck_s <= max(1, factor) * first.bottleneck_s * (1 + 1e-6)
