"""Which of many unequal units to use, and in what order: paths of units that could share the work, were it a fluid.

In a pipeline of bottleneck T, a unit that receives and sends for c seconds can do (T - c) / (its time for all the work)
of the work, and hold its memory's share of it.  For a given T a path grows greedily by the unit that can do most, its
link to the one before counted; the least T for which some path can do everything is found by bisection.
"""

from __future__ import annotations

import numpy as np

from nesa_ray.planning.orders import crossings, narrow_order
from nesa_ray.planning.problem import Problem

SEEDS = 24  # units a path is started from
HALVINGS = 12
RELAXED = (1.0, 1.1, 1.3, 1.6, 2.0)  # times the least bottleneck: a little more time needs far fewer units
SLACK = 1.15  # of the work that a path can do: items are not a fluid
WIDTHS = (0.05, 0.25, 0.5, 0.75)  # cuts are expected where no more bytes cross than at this part of an order's places


def promising_paths(problem: Problem) -> list[tuple[float, np.ndarray]]:
    """(the bottleneck it might have, sequence of units) of some paths, the most promising first."""
    found = [p for tensors, crossing in _cuts(problem) for p in _paths(problem, tensors, crossing)]
    distinct: dict[tuple[int, ...], tuple[float, np.ndarray]] = {}
    for seconds, path in sorted(found, key=lambda p: p[0]):
        distinct.setdefault(tuple(path.tolist()), (seconds, path))
    return list(distinct.values())


def _paths(problem: Problem, tensors: float, crossing_bytes: float) -> list[tuple[float, np.ndarray]]:
    """Where so many tensors and bytes cross each cut."""
    time_s = np.array([problem.unit_time_s(u).max(axis=0).sum() for u in range(len(problem.units))])
    runs = np.isfinite(time_s)
    if not runs.any():
        return []
    whole = max(float(problem.memory_bytes.sum()), 1e-300)
    room = np.minimum(problem.capacity_bytes / whole, 1.0)
    wire_s = tensors * problem.latency_s + crossing_bytes * problem.s_per_byte
    cheapest = wire_s[problem.place].min(axis=1)
    usefulness = np.where(runs, room / np.maximum(time_s, 1e-300) / np.maximum(cheapest, 1e-300), 0.0)
    seeds = np.argsort(-usefulness, kind="stable")[:SEEDS]

    def path(seed: int, target_s: float) -> np.ndarray | None:
        """Units from `seed` on that can do everything within the target; None when they can't."""
        taken: np.ndarray = np.zeros(len(time_s), dtype=bool)
        last, done = seed, 0.0
        found: list[int] = []
        for _ in range(len(time_s)):
            wire = np.where(problem.free, 0.0, wire_s[problem.place[last], problem.place]) if found else 0.0
            able = np.where(
                taken | ~runs, 0.0, np.minimum((target_s - 2 * np.asarray(wire)) / np.maximum(time_s, 1e-300), room)
            )
            last = int(np.argmax(able)) if found else seed
            if able[last] <= 0:
                return None
            taken[last] = True
            found.append(last)
            done += float(able[last])
            if done >= SLACK:
                return np.array(found)
        return None

    def shortest(target_s: float) -> np.ndarray | None:
        found = [p for p in (path(int(s), target_s) for s in seeds if runs[s]) if p is not None]
        return min(found, key=len) if found else None

    low, high = 0.0, float(time_s[runs].max()) + 2 * float(wire_s.max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if shortest(middle) is not None else (middle, high)
    found = [(t, shortest(t)) for t in (high * factor for factor in RELAXED)]
    return [(t, p) for t, p in found if p is not None]


def _cuts(problem: Problem) -> list[tuple[float, float]]:
    """(tensors, bytes) that cross at some places of an order, by WIDTHS."""
    inside = crossings(problem, narrow_order(problem))[:, 1:-1]
    if not inside.size:
        return [(0.0, 0.0)]
    by_bytes = np.argsort(inside[1], kind="stable")
    return [tuple(inside[:, by_bytes[int(w * len(by_bytes))]].tolist()) for w in WIDTHS]
