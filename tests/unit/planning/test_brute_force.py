"""Against every acyclic partition of small random graphs on random unequal devices."""

import random

import pytest

from nesa_ray.errors import Infeasible
from nesa_ray.planning.partition import partition
from tests.unit.planning.random_problems import brute_force, random_graph, random_topology

BATCH = 25


def case(seed: int):
    rng = random.Random(seed)
    kinds = ("gpu", "cpu") if rng.random() < 0.5 else ("gpu",)
    graph = random_graph(rng, rng.randint(1, 7), kinds=kinds, backward=rng.random() < 0.3)
    topology = random_topology(
        rng, rng.randint(1, 3), unequal_links=rng.random() < 0.5, tight=rng.choice([4, 8, 15]), kinds=kinds
    )
    return graph, topology, rng.random() < 0.3, rng.choice([None, None, None, 1, 2, 3])


@pytest.mark.parametrize("first", range(0, 300, BATCH))
def test_throughput_is_the_least_and_the_bound_never_above(first: int) -> None:
    for seed in range(first, first + BATCH):
        graph, topology, overlap, stages = case(seed)
        best = brute_force(graph, topology, overlap=overlap, stages=stages)
        try:
            plan = partition(graph, topology, overlap=overlap, stages=stages, max_seconds=30)
        except Infeasible:
            assert best is None, f"seed {seed}: a plan of {best} exists"
            continue
        assert best is not None, f"seed {seed}"
        plan.check(graph, topology)
        assert plan.bottleneck_s == pytest.approx(best[0], rel=2e-7, abs=1e-12), f"seed {seed}"
        assert plan.lower_bound_s <= best[0] * (1 + 1e-9), f"seed {seed}"
        assert plan.proved_optimal, f"seed {seed}"


@pytest.mark.parametrize("first", range(0, 75, BATCH))
def test_latency_is_the_least(first: int) -> None:
    for seed in range(first, first + BATCH):
        graph, topology, _, stages = case(seed)
        best = brute_force(graph, topology, stages=stages)
        try:
            plan = partition(graph, topology, objective="latency", stages=stages, max_seconds=30)
        except Infeasible:
            assert best is None, f"seed {seed}: a plan of {best} exists"
            continue
        assert best is not None, f"seed {seed}"
        assert plan.latency_s == pytest.approx(best[1], rel=1e-9, abs=1e-12), f"seed {seed}"
        assert plan.lower_bound_s <= best[1] * (1 + 1e-9), f"seed {seed}"
