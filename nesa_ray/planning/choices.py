"""Which unit may run the next stage: a small acyclic automaton whose paths are the device sequences considered.

Two ways to make one.  *By class*: a state counts how many units of each interchangeable class are used, so that all
device sequences are considered at once; exact, for few classes.  *By sequence*: units come in one given order and any
may be left out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from nesa_ray.planning.problem import Problem

LAST, EARLIER, NEXT, LATER = range(4)


@dataclass(frozen=True, eq=False)
class Choices:
    """States 0..S-1 in topological order, and the transitions between them.

    A transition uses one unit of `unit_class` (-1: none).  `wires` are its links to the stage before (LAST), to the
    cheapest of the stages before (EARLIER), to the stage after (NEXT) and to the cheapest of those after (LATER), each
    as (latency_s, seconds per byte), zero where there is none.

    states          S
    source, target  [E] states, sorted by source
    unit_class      [E] index into `classes`
    wires           [E, 4, 2]
    starts, ends    [S] a slicing may start, may end here
    classes         units of each class, interchangeable
    """

    states: int
    source: np.ndarray
    target: np.ndarray
    unit_class: np.ndarray
    wires: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    classes: tuple[tuple[int, ...], ...]


def unit_classes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Interchangeable units together, in the order they appear."""
    by_class: dict[tuple, list[int]] = {}
    for u in range(len(problem.units)):
        by_class.setdefault(problem.unit_class(u), []).append(u)
    return tuple(tuple(units) for units in by_class.values())


def states_by_class(problem: Problem) -> int:
    """States that `by_class` would make."""
    counts = 1
    for units in unit_classes(problem):
        counts *= len(units) + 1
    places = 1 if problem.one_link else len(problem.latency_s) + 1
    return counts * places * places


def by_class(problem: Problem, stages: int | None = None) -> Choices:
    """All device sequences at once; `stages` fixes how many units are used."""
    classes = unit_classes(problem)
    place = [0 if problem.one_link else int(problem.place[units[0]]) for units in classes]
    here = sorted(set(place))
    nothing = -1
    # A state: units used of each class, the place of the last stage, and the place promised for the next.
    counts = sorted(itertools.product(*(range(len(units) + 1) for units in classes)), key=lambda c: (sum(c), c))
    befores = [nothing, *here]
    states = [
        (c, last, promised)
        for c in counts
        for last in befores
        for promised in befores
        if (last == nothing) == (sum(c) == 0)
        and (last == nothing or any(n and place[k] == last for k, n in enumerate(c)))
    ]
    index = {s: i for i, s in enumerate(states)}
    edges: list[tuple] = []
    cheapest = functools.cache(functools.partial(_cheapest, problem))
    for (c, last, promised), i in index.items():
        for k, units in enumerate(classes):
            if c[k] == len(units) or place[k] != promised:
                continue
            used = (*c[:k], c[k] + 1, *c[k + 1 :])
            behind = frozenset(p for p, count in zip(place, c, strict=True) if count)
            ahead = frozenset(p for p, count, of in zip(place, used, classes, strict=True) if count < len(of))
            for following in befores:
                target = index.get((used, place[k], following))
                if target is not None:
                    stages_at = (frozenset({last}) - {nothing}, behind, frozenset({following}) - {nothing}, ahead)
                    edges.append((i, target, k, *(cheapest(place[k], to) for to in stages_at)))
    ends = [last != nothing and promised == nothing and stages in (None, sum(c)) for c, last, promised in states]
    starts = [sum(c) == 0 and promised != nothing for c, _, promised in states]
    return _choices(len(states), edges, starts, ends, classes)


def by_sequence(problem: Problem, sequence: Sequence[int], stages: int | None = None) -> Choices:
    """Units in one order, any left out; links are taken to the neighbours in the sequence."""
    classes = unit_classes(problem)
    class_of = {u: k for k, units in enumerate(classes) for u in units}
    m = len(sequence)
    every = stages == m  # none is left out: nothing to count
    levels = 1 if stages is None or every else stages + 1
    edges: list[tuple] = []
    for j, u in enumerate(sequence):
        here = int(problem.place[u])
        before, after = (
            _cheapest(problem, here, {int(problem.place[sequence[i]])} if 0 <= i < m else set()) for i in (j - 1, j + 1)
        )
        for level in range(levels):
            at = j * levels + level
            if not every:
                edges.append((at, at + levels, -1, *[(0.0, 0.0)] * 4))
            if levels == 1 or level < levels - 1:
                step = 0 if levels == 1 else 1
                edges.append((at, at + levels + step, class_of[u], before, before, after, after))
    total = (m + 1) * levels
    starts = [i == 0 for i in range(total)]
    ends = [i == total - 1 for i in range(total)]
    return _choices(total, edges, starts, ends, classes)


def _cheapest(problem: Problem, here: int, places: AbstractSet[int]) -> tuple[float, float]:
    """The least latency and the least seconds per byte between a place and some; zero to none."""
    if not places:
        return 0.0, 0.0
    to = sorted(places)
    return float(problem.latency_s[here, to].min()), float(problem.s_per_byte[here, to].min())


def _choices(states: int, edges: list[tuple], starts: list[bool], ends: list[bool], classes: tuple) -> Choices:
    edges = sorted(edges)
    source, target, unit_class = (np.array([e[i] for e in edges], dtype=np.int64) for i in range(3))
    wires = np.array([e[3:] for e in edges], dtype=np.float64).reshape(-1, 4, 2)
    return Choices(states, source, target, unit_class, wires, np.array(starts), np.array(ends), classes)
