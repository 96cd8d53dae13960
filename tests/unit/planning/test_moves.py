"""Totals against plan.cost_stages, and what annealing keeps."""

import random

import numpy as np
import pytest

from nesa_ray.errors import Infeasible
from nesa_ray.planning.moves import Assignment, anneal, cost_of
from nesa_ray.planning.orders import random_order
from nesa_ray.planning.partition import stages_of
from nesa_ray.planning.plan import check_assignment
from nesa_ray.planning.problem import Problem, prepare
from nesa_ray.planning.search import Limits, search
from tests.unit.planning.random_problems import random_graph, random_topology


def starts(seeds: range):
    for seed in seeds:
        rng = random.Random(seed)
        graph = random_graph(rng, rng.randint(4, 30), kinds=("gpu", "cpu"), backward=seed % 3 == 0)
        topology = random_topology(rng, rng.randint(2, 5), unequal_links=seed % 2 == 0, tight=60, kinds=("gpu", "cpu"))
        try:
            problem = prepare(graph, topology, [(d.id,) for d in topology.devices])
            yield problem, search(problem, Limits(deadline=np.inf, prove=False, rounds=0)).assignment, seed
        except Infeasible:
            continue


def check(problem: Problem, assignment: Assignment, overlap: bool) -> None:
    stages = stages_of(problem, assignment, overlap=overlap)
    check_assignment(problem.graph, problem.topology, stages)
    assert assignment.cost_s == pytest.approx(max(s.cost_s for s in stages), rel=1e-9)
    source = np.repeat(np.arange(problem.n), np.diff(problem.after[0]))
    assert (assignment.position[source] <= assignment.position[problem.after[1]]).all()


@pytest.mark.parametrize("overlap", [False, True])
def test_annealing_keeps_a_plan_valid_and_never_makes_it_worse(overlap: bool) -> None:
    for problem, start, seed in starts(range(40)):
        first = cost_of(problem, start.position, start.sequence, overlap=overlap)
        check(problem, first, overlap)
        moved = anneal(problem, first, steps=5000, seed=seed, overlap=overlap, swap=True, hot=2.0)
        check(problem, moved, overlap)
        assert moved.cost_s <= first.cost_s


def test_kept_positions_stay_filled() -> None:
    for problem, _, seed in starts(range(100, 130)):
        order = random_order(problem, np.random.default_rng(seed))
        m = min(3, problem.n, len(problem.units))
        position = np.empty(problem.n, dtype=np.int64)
        for s, part in enumerate(np.array_split(order, m)):
            position[part] = s
        start = cost_of(problem, position, np.arange(m))
        if not np.isfinite(start.cost_s):
            continue
        moved = anneal(problem, start, steps=3000, seed=seed, keep=True, hot=5.0)
        assert set(moved.position.tolist()) == set(range(m))
