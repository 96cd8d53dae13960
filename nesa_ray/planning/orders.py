# mypy: disable-error-code="var-annotated,no-untyped-def,assignment"
"""Topological orders of a problem's items: natural, depth-first by random keys, and near an assignment."""

from __future__ import annotations

import heapq

import numpy as np

from nesa_ray.planning.compiled import compiled
from nesa_ray.planning.problem import Problem


def first_order(problem: Problem) -> np.ndarray:
    """Depth-first, in the order of the graph's nodes."""
    return order_by(problem, np.arange(problem.n, dtype=float))


def natural_order(problem: Problem) -> np.ndarray:
    """The order of the graph's nodes, as near as precedence lets it be (Kahn 1962, the least node first)."""
    pointer, after = problem.after
    waiting = np.diff(problem.before[0])
    least = [m[0] for m in problem.members]
    ready = [(least[v], v) for v in range(problem.n) if not waiting[v]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, v = heapq.heappop(ready)
        order.append(v)
        for w in after[pointer[v] : pointer[v + 1]].tolist():
            waiting[w] -= 1
            if not waiting[w]:
                heapq.heappush(ready, (least[w], w))
    return np.array(order, dtype=np.int64)


def narrow_order(problem: Problem) -> np.ndarray:
    """Of the natural and the depth-first order, the one whose places are crossed by fewer bytes."""
    return min(
        (natural_order(problem), first_order(problem)), key=lambda order: float(crossings(problem, order)[1].sum())
    )


def crossings(problem: Problem, order: np.ndarray) -> np.ndarray:
    """[2, n + 1] tensors and bytes that cross each place of an order: place i is before its item i."""
    crossing = np.zeros((2, problem.n + 1))
    pointer, pins = problem.pins
    if not len(pins):
        return crossing
    position = np.empty(problem.n, dtype=np.int64)
    position[order] = np.arange(problem.n)
    made, used = position[problem.producer], position[pins]
    first = np.minimum(made, np.minimum.reduceat(used, pointer[:-1]))
    last = np.maximum(made, np.maximum.reduceat(used, pointer[:-1]))
    for row, weights in enumerate((np.ones(len(made)), problem.tensor_bytes)):
        np.add.at(crossing[row], first + 1, weights)
        np.add.at(crossing[row], last + 1, -weights)
    return np.cumsum(crossing, axis=1)


def random_order(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """Depth-first by random keys (MTPP's sort, arXiv 2311.03703)."""
    return order_by(problem, rng.random(problem.n))


def order_by(problem: Problem, keys: np.ndarray, position: np.ndarray | None = None) -> np.ndarray:
    """Depth-first: of the items that are ready, the newest with the least key.

    With `position`, which must not fall along precedence, items of an earlier position all come first.
    """
    if position is None:
        position = np.zeros(problem.n, dtype=np.int64)
    waiting = np.diff(problem.before[0])
    return _order(np.argsort(-keys, kind="stable"), keys.astype(np.float64), position, *problem.after, waiting)


@compiled
def _order(latest_first, keys, position, after_ptr, after, waiting):
    n = len(keys)
    levels = 0
    for i in range(n):
        levels = max(levels, position[i] + 1)
    # A stack for each position, as linked lists.
    top = np.full(levels, -1, np.int64)
    below = np.full(n, -1, np.int64)
    for i in latest_first:
        if waiting[i] == 0:
            below[i] = top[position[i]]
            top[position[i]] = i
    order = np.empty(n, np.int64)
    fresh = np.empty(n, np.int64)
    done = 0
    for s in range(levels):
        while top[s] >= 0:
            v = top[s]
            top[s] = below[v]
            order[done] = v
            done += 1
            count = 0
            for x in range(after_ptr[v], after_ptr[v + 1]):
                w = after[x]
                waiting[w] -= 1
                if waiting[w] == 0:
                    y = count
                    while y > 0 and keys[fresh[y - 1]] < keys[w]:
                        fresh[y] = fresh[y - 1]
                        y -= 1
                    fresh[y] = w
                    count += 1
            for y in range(count):
                w = fresh[y]
                below[w] = top[position[w]]
                top[position[w]] = w
    return order
