"""Which unit may run the next stage: a small acyclic automaton whose paths are the device sequences considered.

Two ways to make one.  *By class*: a state counts how many units of each interchangeable class are used, so that all
device sequences are considered at once; exact, for few classes.  *By sequence*: units come in one given order and any
may be left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nesa_ray.planning.problem import Problem


@dataclass(frozen=True, eq=False)
class Choices:
    """States 0..S-1 in topological order, and the transitions between them.

    A transition uses one unit of `unit_class` (-1: none), with the links to the stage before and after given as places
    (-1: there is none).

    states          S
    source, target  [E] states, sorted by source
    unit_class      [E] index into `classes`
    place_before    [E] place of the stage before
    place_after     [E] place of the stage after
    starts, ends    [S] a slicing may start, may end here
    classes         units of each class, interchangeable
    """

    states: int
    source: np.ndarray
    target: np.ndarray
    unit_class: np.ndarray
    place_before: np.ndarray
    place_after: np.ndarray
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
    edges: list[tuple[int, int, int, int, int]] = []
    for (c, last, promised), i in index.items():
        for k, units in enumerate(classes):
            if c[k] == len(units) or place[k] != promised:
                continue
            used = (*c[:k], c[k] + 1, *c[k + 1 :])
            for following in befores:
                target = index.get((used, place[k], following))
                if target is not None:
                    edges.append((i, target, k, last, following))
    ends = [last != nothing and promised == nothing and stages in (None, sum(c)) for c, last, promised in states]
    starts = [sum(c) == 0 and promised != nothing for c, _, promised in states]
    return _choices(len(states), edges, starts, ends, classes)


def by_sequence(problem: Problem, sequence: Sequence[int], stages: int | None = None) -> Choices:
    """Units in one order, any left out; links are taken to the neighbours in the sequence."""
    classes = unit_classes(problem)
    class_of = {u: k for k, units in enumerate(classes) for u in units}
    m = len(sequence)
    levels = 1 if stages is None else stages + 1
    edges: list[tuple[int, int, int, int, int]] = []
    for j, u in enumerate(sequence):
        before = int(problem.place[sequence[j - 1]]) if j else -1
        after = int(problem.place[sequence[j + 1]]) if j + 1 < m else -1
        for level in range(levels):
            at = j * levels + level
            edges.append((at, at + levels, -1, -1, -1))
            if stages is None or level < stages:
                step = 0 if stages is None else 1
                edges.append((at, at + levels + step, class_of[u], before, after))
    total = (m + 1) * levels
    starts = [i == 0 for i in range(total)]
    ends = [i == total - 1 for i in range(total)]
    return _choices(total, edges, starts, ends, classes)


def _choices(
    states: int, edges: list[tuple[int, int, int, int, int]], starts: list[bool], ends: list[bool], classes: tuple
) -> Choices:
    table = np.array(sorted(edges), dtype=np.int64).reshape(-1, 5)
    columns = [np.ascontiguousarray(table[:, i]) for i in range(5)]
    return Choices(
        states, columns[0], columns[1], columns[2], columns[3], columns[4], np.array(starts), np.array(ends), classes
    )
