"""The dynamic program against every slicing of its order."""

import itertools
import random

import numpy as np
import pytest

from nesa_ray.errors import Infeasible
from nesa_ray.planning.choices import by_class, by_sequence
from nesa_ray.planning.moves import totals
from nesa_ray.planning.orders import order_by, random_order
from nesa_ray.planning.problem import Problem, prepare
from nesa_ray.planning.slicing import Slicer
from tests.unit.planning.random_problems import random_graph, random_topology


def every_slicing(problem: Problem, order: np.ndarray, sequences, overlap: bool) -> float:
    """The least bottleneck over cuts of the order and the device sequences."""
    best = np.inf
    for sequence in sequences:
        for used in range(1, min(len(sequence), problem.n) + 1):
            for units in itertools.combinations(sequence, used):
                for cuts in itertools.combinations(range(1, problem.n), used - 1):
                    position = np.empty(problem.n, dtype=np.int64)
                    for s, part in enumerate(np.split(order, cuts)):
                        position[part] = s
                    now = totals(problem, position, np.array(units), overlap=overlap)
                    if (now.memory_bytes <= problem.capacity_bytes[list(units)]).all():
                        best = min(best, float(now.cost_s.max()))
    return best


def problems(seeds: range):
    for seed in seeds:
        rng = random.Random(seed)
        graph = random_graph(rng, rng.randint(2, 7), kinds=("gpu", "cpu"), backward=seed % 2 == 0)
        topology = random_topology(rng, rng.randint(1, 3), unequal_links=False, tight=12, kinds=("gpu", "cpu"))
        try:
            yield prepare(graph, topology, [(d.id,) for d in topology.devices]), seed
        except Infeasible:
            continue


@pytest.mark.parametrize("overlap", [False, True])
def test_one_sequence(overlap: bool) -> None:
    for problem, seed in problems(range(60)):
        sequence = list(range(len(problem.units)))
        order = random_order(problem, np.random.default_rng(seed))
        found = Slicer(problem, by_sequence(problem, sequence), overlap=overlap).slice(order)
        expected = every_slicing(problem, order, [sequence], overlap)
        assert (np.inf if found is None else found.cost_s) == pytest.approx(expected, rel=1e-9, abs=1e-12), seed


@pytest.mark.parametrize("overlap", [False, True])
def test_all_sequences_at_once(overlap: bool) -> None:
    for problem, seed in problems(range(60)):
        order = random_order(problem, np.random.default_rng(seed))
        found = Slicer(problem, by_class(problem), overlap=overlap).slice(order)
        sequences = itertools.permutations(range(len(problem.units)))
        expected = every_slicing(problem, order, sequences, overlap)
        assert (np.inf if found is None else found.cost_s) == pytest.approx(expected, rel=1e-9, abs=1e-12), seed


def test_only_below_a_limit() -> None:
    problem, seed = next(iter(problems(range(100, 120))))
    order = order_by(problem, np.arange(problem.n, dtype=float))
    slicer = Slicer(problem, by_class(problem))
    found = slicer.slice(order)
    assert found is not None
    assert slicer.slice(order, found.cost_s * (1 - 1e-9)) is None, seed
    assert slicer.slice(order, found.cost_s * 1.01) is not None, seed
