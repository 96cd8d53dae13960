# mypy: disable-error-code="var-annotated"
"""Smaller problems: items merged into clusters whose quotient is acyclic, to plan first and refine after.

Consecutive items of a topological order make acyclic clusters.  Cut where the fewest bytes cross, they follow a
model's repeated blocks by themselves: between two layers of a decoder only the residual crosses.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from nesa_ray.planning.orders import crossings, order_by
from nesa_ray.planning.problem import Problem, data_flow


def merge_segments(problem: Problem, order: np.ndarray, parts: int) -> tuple[Problem, np.ndarray]:
    """(problem, cluster of each item): the order in about `parts` segments of even work and memory.

    A segment ends, between half and all of its share, where the fewest bytes cross.
    """
    n = problem.n
    crossing = crossings(problem, order)[1]
    fastest, memory = problem.time_s.min(axis=0)[order], problem.memory_bytes[order]
    share = fastest / max(fastest.sum(), 1e-300) + memory / max(memory.sum(), 1e-300)
    until = np.concatenate([[0.0], np.cumsum(share)]) * parts / 2
    cuts = [0]
    while cuts[-1] < n:
        start = cuts[-1]
        first = int(np.searchsorted(until, until[start] + 0.5))
        last = int(np.searchsorted(until, until[start] + 1.0, side="right")) - 1
        first, last = min(max(first, start + 1), n), min(max(last, start + 1), n)
        window = crossing[min(first, last) : last + 1]
        cuts.append(n if last == n else last - int(np.argmin(window[::-1])))
    cluster = np.empty(n, dtype=np.int64)
    for c, (a, b) in enumerate(pairwise(cuts)):
        cluster[order[a:b]] = c
    return contracted(problem, cluster), cluster


def merge_chains(problem: Problem) -> tuple[Problem, np.ndarray]:
    """(problem, cluster of each item): items that only feed each other, in line, become one while it fits a device."""
    n = problem.n
    pointer, after = problem.after
    fan_in = np.diff(problem.before[0])
    room = float(np.median(problem.capacity_bytes)) / 4
    cluster = np.full(n, -1)
    held: list[float] = []
    for v in order_by(problem, np.arange(n, dtype=float)).tolist():
        if cluster[v] < 0:
            cluster[v] = len(held)
            held.append(float(problem.memory_bytes[v]))
        following = after[pointer[v] : pointer[v + 1]]
        if len(following) == 1 and fan_in[following[0]] == 1:
            w = int(following[0])
            if held[cluster[v]] + problem.memory_bytes[w] <= room:
                cluster[w] = cluster[v]
                held[cluster[v]] += float(problem.memory_bytes[w])
    return contracted(problem, cluster), cluster


def contracted(problem: Problem, cluster: np.ndarray) -> Problem:
    """The problem over clusters of items; the quotient must be acyclic."""
    n = int(cluster.max()) + 1
    members: list[tuple[int, ...]] = [()] * n
    for i, c in enumerate(cluster.tolist()):
        members[c] += problem.members[i]
    time_s = np.stack([np.bincount(cluster, weights=row, minlength=n) for row in problem.time_s])
    source = np.repeat(np.arange(problem.n), np.diff(problem.after[0]))
    pairs = sorted(
        {(int(a), int(b)) for a, b in zip(cluster[source], cluster[problem.after[1]], strict=True) if a != b}
    )
    producer, sizes, pins = [], [], []
    for t, p in enumerate(problem.producer.tolist()):
        to = sorted(set(cluster[problem.pins[1][problem.pins[0][t] : problem.pins[0][t + 1]]].tolist()) - {cluster[p]})
        if to:
            producer.append(int(cluster[p]))
            sizes.append(float(problem.tensor_bytes[t]))
            pins.append(to)
    return replace(
        problem,
        members=tuple(members),
        time_s=time_s,
        memory_bytes=np.bincount(cluster, weights=problem.memory_bytes, minlength=n),
        **data_flow(n, pairs, producer, sizes, pins),
    )
