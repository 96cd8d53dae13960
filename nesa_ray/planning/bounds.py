"""Lower bounds: how good could any plan be?  Every bound here is proved, none is an estimate."""

from __future__ import annotations

import time

import numpy as np

from nesa_ray.planning.problem import Problem
from nesa_ray.planning.proof import find_below

FIRST_STEP = 4e-3
BOOLEANS_PER_S = 10_000  # that a model is built with, at least


def simple_bound(problem: Problem, stages: int | None = None, replicas: int = 1) -> tuple[float, str]:
    """(seconds, why): the largest item on its fastest device, and all work over all devices.

    `problem` has one device per unit.  In a second, a device does at most max over items of (fastest time / its time)
    of the work counted in fastest seconds; with fixed `stages` only the best `stages` × `replicas` devices count.
    """
    fastest = problem.time_s.min(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(problem.time_s > 0, fastest / problem.time_s, 0.0).max(axis=1)
    speeds = np.sort(rate[problem.unit_types[1]])[::-1]
    if stages is not None:
        speeds = speeds[: stages * replicas]
    largest = float(fastest.max()) / replicas
    if problem.n == 1:
        return largest, "the graph can't be cut"
    shared = float(fastest.sum()) / float(speeds.sum()) if speeds.sum() else 0.0
    if largest >= shared:
        return largest, "the largest node on its fastest device"
    return shared, "all work over all devices"


def critical_path(problem: Problem) -> float:
    """Seconds of the longest forward path, every item on its fastest device and no transfers."""
    fastest = problem.time_s.min(axis=0)
    finish = np.zeros(problem.n)
    waiting = np.diff(problem.before[0]).copy()
    pointer, after = problem.after
    ready = [i for i in range(problem.n) if not waiting[i]]
    while ready:
        v = ready.pop()
        finish[v] += fastest[v]
        for w in after[pointer[v] : pointer[v + 1]].tolist():
            finish[w] = max(finish[w], finish[v])
            waiting[w] -= 1
            if not waiting[w]:
                ready.append(w)
    return float(finish.max())


def raise_bound(
    problem: Problem, low_s: float, high_s: float, *, seconds: float, stages: int | None, overlap: bool, seed: int
) -> float:
    """The largest bound from `low_s` up to `high_s` that CP-SAT proves in the time, in growing steps from below.

    A step that CP-SAT leaves open, or finds a plan for, is tried again a quarter as long.
    """
    deadline = time.perf_counter() + seconds
    setup_s = problem.n * min(len(problem.units), problem.n) / BOOLEANS_PER_S
    low, step = low_s, FIRST_STEP
    while (left := deadline - time.perf_counter() - setup_s) > 0.1 and step >= FIRST_STEP / 4:
        target = low * (1 + step)
        if target >= high_s:
            step /= 4
            continue
        answer = find_below(problem, target, stages=stages, overlap=overlap, seconds=left / 2, seed=seed)
        if answer.exists is False:
            low, step = target, 2.5 * step
        else:
            step /= 4
    return low
