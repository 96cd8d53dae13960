"""The dynamic program over all orders against every acyclic partition."""

import random

import numpy as np
import pytest

import nesa_ray.planning.ideals as ideals
from nesa_ray.errors import Infeasible
from nesa_ray.planning.ideals import slice_all_orders
from nesa_ray.planning.moves import totals
from nesa_ray.planning.problem import prepare
from tests.unit.planning.random_problems import brute_force, random_graph, random_topology

BATCH = 40


def cases(seeds: range, *, unequal_links: bool):
    for seed in seeds:
        rng = random.Random(seed)
        graph = random_graph(rng, rng.randint(2, 7), kinds=("gpu", "cpu"), backward=seed % 3 == 0)
        tight = rng.choice([6, 12])
        topology = random_topology(
            rng, rng.randint(1, 3), unequal_links=unequal_links, tight=tight, kinds=("gpu", "cpu")
        )
        try:
            problem = prepare(graph, topology, [(d.id,) for d in topology.devices])
        except Infeasible:
            continue
        overlap, stages = rng.random() < 0.3, rng.choice([None, None, min(2, len(topology.devices))])
        best = brute_force(graph, topology, overlap=overlap, stages=stages)
        yield seed, problem, overlap, stages, np.inf if best is None else best[0]


def limit(best: float) -> float:
    """Above the best; where there is none, above everything."""
    return 1.5 * best + 1e-6 if np.isfinite(best) else 1e9


@pytest.mark.parametrize("first", range(0, 200, BATCH))
def test_one_kind_of_link_gives_the_optimum(first: int) -> None:
    for seed, problem, overlap, stages, best in cases(range(first, first + BATCH), unequal_links=False):
        if stages is not None and problem.n < len(problem.graph.nodes):
            continue  # what was contracted may be needed for the count
        answer = slice_all_orders(problem, limit(best), stages=stages, overlap=overlap)
        assert answer is not None
        if not np.isfinite(best):
            assert answer.position is None, seed
            continue
        assert answer.bound_s == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        sequence = np.array([answer.unit_of[answer.position == s][0] for s in range(answer.position.max() + 1)])
        now = totals(problem, answer.position, sequence, overlap=overlap)
        assert now.cost_s.max() == pytest.approx(best, rel=1e-9, abs=1e-12), seed
        assert (now.memory_bytes <= problem.capacity_bytes[sequence] * (1 + 1e-9)).all(), seed
        below = slice_all_orders(problem, best * (1 - 1e-9), stages=stages, overlap=overlap)
        assert below.position is None, seed


@pytest.mark.parametrize("work", [ideals.WORK, 40])
@pytest.mark.parametrize("first", range(0, 200, BATCH))
def test_the_bound_is_never_above(first: int, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ideals, "WORK", work)  # little work: units are rounded up to few classes
    answered = 0
    for seed, problem, overlap, stages, best in cases(range(first, first + BATCH), unequal_links=True):
        if stages is not None and problem.n < len(problem.graph.nodes):
            continue
        answer = slice_all_orders(problem, limit(best), stages=stages, overlap=overlap)
        if answer is None:
            continue
        answered += 1
        assert answer.bound_s <= (best if np.isfinite(best) else limit(best)) * (1 + 1e-9), seed
        if answer.position is not None:
            sequence = np.array([answer.unit_of[answer.position == s][0] for s in range(answer.position.max() + 1)])
            now = totals(problem, answer.position, sequence, overlap=overlap)
            assert now.cost_s.max() >= best * (1 - 1e-9), seed
            assert (now.memory_bytes <= problem.capacity_bytes[sequence] * (1 + 1e-9)).all(), seed
    assert answered > BATCH / 10


def test_too_many_ideals() -> None:
    rng = random.Random(0)
    graph = random_graph(rng, 40)
    topology = random_topology(rng, 3, unequal_links=False, tight=1e9, kinds=("gpu",))
    problem = prepare(graph, topology, [(d.id,) for d in topology.devices])
    assert slice_all_orders(problem, 1e9) is None
