# mypy: disable-error-code="var-annotated,no-untyped-def,assignment"
"""The least end-to-end time of one sample: moves of items over the stage DAG, branches side by side where it pays.

A stage starts when everything it consumes has arrived, so the latency is the longest path through the stage DAG of
compute and transfers (plan.latency_seconds).  Positions are a topological order of the stages throughout: the longest
path is one pass over them.  Chains of items move as one first, then every item by itself.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from nesa_ray.errors import Infeasible
from nesa_ray.planning.coarsen import merge_chains
from nesa_ray.planning.compiled import compiled
from nesa_ray.planning.moves import Assignment, carried, totals
from nesa_ray.planning.orders import random_order
from nesa_ray.planning.problem import Problem
from nesa_ray.planning.search import Limits, search

STEPS = 60_000
ROUNDS = 24
RESTARTS = 12


def least_latency(problem: Problem, limits: Limits, bound_s: float = 0.0) -> Assignment:
    """The assignment with the least latency found; `problem` holds forward tensors only.

    It ends early at `bound_s`, below which no latency is.

    Raises Infeasible when nothing fits.
    """
    rng = np.random.default_rng(limits.seed)
    done = bound_s * (1 + 1e-9)
    best: Assignment | None = None
    for start in _starts(problem, limits, slicing=False):
        best = start if best is None or start.cost_s < best.cost_s else best
    if best is None or best.cost_s > done:
        for start in _starts(problem, limits):
            best = start if best is None or start.cost_s < best.cost_s else best
    if best is None:
        raise Infeasible("memory: no cut that was found fits the devices")
    if limits.stages is None and best.cost_s > done:
        coarse, cluster_of = merge_chains(problem)
        for start in _starts(coarse, limits, slicing=False):
            found = _rounds(coarse, start, limits, rng, done, rounds=8)
            fine = with_latency(problem, found.position[cluster_of], found.sequence)
            best = fine if fine.cost_s < best.cost_s else best
    best = _rounds(problem, best, limits, rng, done)
    for _ in range(RESTARTS):
        if limits.left_s <= 0 or best.cost_s <= done:
            break
        tries = (_random_start(problem, limits, rng) for _ in range(30))
        chosen = next((s for s in tries if s is not None), None)
        if chosen is not None:
            found = _rounds(problem, chosen, replace(limits, report=None), rng, done, rounds=4)
            best = found if found.cost_s < best.cost_s else best
    return best


def _random_start(problem: Problem, limits: Limits, rng: np.random.Generator) -> Assignment | None:
    """A random order cut at random places for units in random order; None where that doesn't fit."""
    m = limits.stages or len(problem.units)
    if m > problem.n and limits.stages:
        return None
    order = random_order(problem, rng)
    used = m if limits.stages else min(int(rng.integers(1, m + 1)), problem.n)
    cuts = np.sort(rng.choice(problem.n - 1, size=used - 1, replace=False)) + 1 if used > 1 else []
    position = np.empty(problem.n, dtype=np.int64)
    for s, part in enumerate(np.split(order, cuts)):
        position[part] = s
    sequence = rng.permutation(len(problem.units))[:m]
    now = totals(problem, position, sequence)
    if (now.memory_bytes > problem.capacity_bytes[sequence] * (1 + 1e-9)).any() or not np.isfinite(now.cost_s).all():
        return None
    return with_latency(problem, position, sequence)


def with_latency(problem: Problem, position: np.ndarray, sequence: np.ndarray) -> Assignment:
    """The assignment with its latency as `cost_s`."""
    return _anneal_latency_of(problem, Assignment(position, sequence, np.inf), 0, 0, keep=False)


def _starts(problem: Problem, limits: Limits, *, slicing: bool = True) -> list[Assignment]:
    """Everything on one unit where it fits, and the best pipeline for throughput."""
    units = len(problem.units)
    found = []
    if limits.stages in (None, 1):
        for u in range(units):
            runs = np.isfinite(problem.unit_time_s(u)).all()
            if runs and problem.memory_bytes.sum() <= problem.capacity_bytes[u] * (1 + 1e-9):
                rest = [v for v in range(units) if v != u] if limits.stages is None else []
                for before in sorted({0, len(rest) // 2, len(rest)}):
                    sequence = np.array([*rest[:before], u, *rest[before:]])
                    found.append(with_latency(problem, np.full(problem.n, before), sequence))
    found = sorted(found, key=lambda a: a.cost_s)[:6]
    if slicing or not found:
        until = time.perf_counter() + 0.3 * max(0.0, limits.left_s)
        quick = replace(limits, deadline=until, prove=False, report=None, rounds=2)
        try:
            pipeline = search(problem, quick).assignment
            found.append(with_latency(problem, pipeline.position, pipeline.sequence))
        except Infeasible:
            if not found and slicing:
                raise
    return found


def _rounds(
    problem: Problem, start: Assignment, limits: Limits, rng: np.random.Generator, done: float, rounds: int = ROUNDS
) -> Assignment:
    """Anneals from the best, swaps units, repeats."""
    best = start
    for _ in range(rounds):
        if limits.left_s <= 0 or best.cost_s <= done:
            break
        steps = min(STEPS, 2000 * problem.n)
        moved = _anneal_latency_of(problem, best, steps, int(rng.integers(2**31)), keep=limits.stages is not None)
        for _ in range(20):
            a, b = rng.integers(len(moved.sequence), size=2)
            sequence = moved.sequence.copy()
            sequence[[a, b]] = sequence[[b, a]]
            now = totals(problem, moved.position, sequence)
            if (now.memory_bytes <= problem.capacity_bytes[sequence] * (1 + 1e-9)).all():
                swapped = with_latency(problem, moved.position, sequence)
                moved = swapped if swapped.cost_s < moved.cost_s else moved
        if moved.cost_s < best.cost_s * (1 - 1e-12):
            best = moved
            if limits.report is not None:
                limits.report("moves", best.cost_s)
    return best


def _anneal_latency_of(problem: Problem, start: Assignment, steps: int, seed: int, *, keep: bool) -> Assignment:
    position, sequence = start.position.astype(np.int64), start.sequence.astype(np.int64)
    m = len(sequence)
    begin = totals(problem, position, sequence)
    pointer, pins = problem.pins
    consumers = np.bincount(
        np.repeat(np.arange(len(pointer) - 1), np.diff(pointer)) * m + position[pins], minlength=(len(pointer) - 1) * m
    ).reshape(-1, m)
    place, free = problem.place[sequence], problem.free[sequence]
    pays = ~(free[:, None] | free)
    wire_s = np.where(pays, problem.latency_s[place[:, None], place], 0.0)
    wire_per_byte = np.where(pays, problem.s_per_byte[place[:, None], place], 0.0)
    tensor, to = np.nonzero(consumers)
    away = position[problem.producer[tensor]] != to
    tensor, to = tensor[away], to[away]
    start_at = position[problem.producer[tensor]]
    between_s = np.zeros((m, m))
    np.add.at(
        between_s,
        (start_at, to),
        wire_s[start_at, to] + problem.tensor_bytes[tensor] * wire_per_byte[start_at, to],
    )
    source = np.repeat(np.arange(problem.n), np.diff(problem.after[0]))
    links = np.zeros((m, m), dtype=np.int64)
    np.add.at(links, (position[source], position[problem.after[1]]), 1)
    best, cost = _anneal_latency(
        position, sequence, problem.time_s, problem.memory_bytes, *problem.unit_types,
        problem.capacity_bytes * (1 + 1e-9), wire_s, wire_per_byte, *problem.after, *problem.before,
        problem.producer, problem.tensor_bytes, *problem.outputs, *problem.inputs, begin.compute_s,
        begin.memory_bytes, begin.items, consumers, between_s, links, keep, steps, seed,
    )  # fmt: skip
    if steps:
        return with_latency(problem, best, sequence)
    return Assignment(position, sequence, float(cost))


@compiled
def _anneal_latency(
    start, sequence, time_s, memory, type_ptr, types, capacity, wire_s, wire_per_byte, after_ptr, after,
    before_ptr, before, producer, tensor_bytes, out_ptr, outs, in_ptr, ins, compute, held, items, consumers,
    between, links, keep, steps, seed,
):  # fmt: skip
    """Returns (best positions, latency of the best)."""
    n, m = len(start), len(sequence)
    np.random.seed(seed)
    at = start.copy()
    best = at.copy()
    finish = np.zeros(m)
    visited = np.zeros(n, np.int64)
    moved = np.empty(n + 1, np.int64)
    origin = np.empty(n + 1, np.int64)
    current, best_cost = np.inf, np.inf
    for step in range(steps + 1):
        count = 0
        b = 0
        if step > 0:
            i = np.random.randint(n)
            b = np.random.randint(m)
            if b == at[i]:
                continue
            most = int(n ** np.random.random())
            count = carried(
                i, b, most, step, keep, at, visited, moved, origin, sequence, capacity, held, items, memory, time_s,
                type_ptr, types, after_ptr, after, before_ptr, before,
            )  # fmt: skip
            if not count:
                continue
        for attempt in range(2):
            for z in range(count):
                i = moved[z]
                a = at[i]
                to = origin[z] if attempt else b
                for end in range(2):
                    s = to if end else a
                    sign = 1.0 if end else -1.0
                    u = sequence[s]
                    for x in range(type_ptr[u], type_ptr[u + 1]):
                        compute[s, x - type_ptr[u]] += sign * time_s[types[x], i]
                    held[s] += sign * memory[i]
                    items[s] += 1 if end else -1
                    for x in range(out_ptr[i], out_ptr[i + 1]):
                        t = outs[x]
                        for c in range(m):
                            if consumers[t, c] > 0 and c != s:
                                between[s, c] += sign * (wire_s[s, c] + tensor_bytes[t] * wire_per_byte[s, c])
                    for x in range(in_ptr[i], in_ptr[i + 1]):
                        t = ins[x]
                        p = at[producer[t]]
                        consumers[t, s] += 1 if end else -1
                        if p != s and consumers[t, s] == end:
                            between[p, s] += sign * (wire_s[p, s] + tensor_bytes[t] * wire_per_byte[p, s])
                    for x in range(after_ptr[i], after_ptr[i + 1]):
                        links[s, at[after[x]]] += 1 if end else -1
                    for x in range(before_ptr[i], before_ptr[i + 1]):
                        links[at[before[x]], s] += 1 if end else -1
                at[i] = to
            if attempt:
                break
            new = 0.0
            for s in range(m):
                if items[s] == 0:
                    continue
                begins = 0.0
                for a in range(s):
                    if links[a, s] > 0:
                        begins = max(begins, finish[a] + between[a, s])
                slowest = 0.0
                for x in range(compute.shape[1]):
                    slowest = max(slowest, compute[s, x])
                finish[s] = begins + slowest
                new = max(new, finish[s])
            if step == 0:
                current = best_cost = new
                break
            change = (new - current) / best_cost
            if change <= 0 or np.random.random() < np.exp(-change / (0.1 * 0.01 ** (step / steps))):
                current = new
                if new < best_cost * (1 - 1e-12):
                    best_cost = new
                    for v in range(n):
                        best[v] = at[v]
                break
    return best, best_cost
