# mypy: disable-error-code="var-annotated,no-untyped-def"
"""Local moves: items go between stages while the stage order stays topological (simulated annealing).

A state gives each item a position in a fixed sequence of units.  An item may go to any position between its last
predecessor's and its first successor's, so every state visited is an acyclic partition.  Costs are exact, unequal
links and hyperedges included.  The energy is sum((cost of stage / reference) ** 16): a smooth stand-in for the largest
stage cost, which alone would not tell most moves apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nesa_ray.planning.compiled import compiled
from nesa_ray.planning.problem import Problem


@dataclass(frozen=True, eq=False)
class Assignment:
    """Item -> position in `sequence` (units).  `cost_s` is the exact bottleneck."""

    position: np.ndarray
    sequence: np.ndarray
    cost_s: float

    @property
    def unit_of(self) -> np.ndarray:
        """Unit of each item."""
        return self.sequence[self.position]


def cost_of(problem: Problem, position: np.ndarray, sequence: np.ndarray, *, overlap: bool = False) -> Assignment:
    """The assignment with its exact cost; positions must respect precedence and memory."""
    return anneal(problem, Assignment(position, sequence, np.inf), steps=0, seed=0, overlap=overlap)


def stage_costs(problem: Problem, position: np.ndarray, sequence: np.ndarray, *, overlap: bool = False) -> np.ndarray:
    """Exact seconds of each position in the sequence."""
    return _anneal(*_arguments(problem, position, sequence), overlap, 0, 0.0, 0.0, 0)[2]


def anneal(
    problem: Problem,
    start: Assignment,
    *,
    steps: int,
    seed: int,
    overlap: bool = False,
    hot: float = 0.3,
    cold: float = 0.003,
) -> Assignment:
    """The best assignment met in `steps` random moves, the temperature falling from `hot` to `cold`."""
    position, cost, _ = _anneal(*_arguments(problem, start.position, start.sequence), overlap, steps, hot, cold, seed)
    return Assignment(position, start.sequence, float(cost))


def _arguments(problem: Problem, position: np.ndarray, sequence: np.ndarray) -> tuple:
    finite = np.where(np.isfinite(problem.time_s), problem.time_s, np.inf)
    return (
        position.astype(np.int64),
        sequence.astype(np.int64),
        finite,
        problem.memory_bytes,
        *problem.unit_types,
        problem.capacity_bytes * (1 + 1e-9),
        problem.place,
        problem.free,
        problem.latency_s,
        problem.s_per_byte,
        *problem.after,
        *problem.before,
        problem.producer,
        problem.tensor_bytes,
        *problem.pins,
        *problem.outputs,
        *problem.inputs,
    )


@compiled
def _anneal(
    start, sequence, time_s, memory, type_ptr, types, capacity, place, free, latency_s, s_per_byte,
    after_ptr, after, before_ptr, before, producer, tensor_bytes, pin_ptr, pins, out_ptr, outs, in_ptr, ins,
    overlap, steps, hot, cold, seed,
):  # fmt: skip
    """Returns (best positions, their bottleneck, stage costs of the start)."""
    n, m, tensors = len(start), len(sequence), len(producer)
    np.random.seed(seed)
    at = start.copy()
    widest = 0
    for u in range(len(type_ptr) - 1):
        widest = max(widest, type_ptr[u + 1] - type_ptr[u])
    compute = np.zeros((m, widest))
    held = np.zeros(m)
    receive = np.zeros(m)
    send = np.zeros(m)
    consumers = np.zeros((tensors, m), np.int32)
    mark = np.zeros(m, np.int64)
    stamp = 0
    for i in range(n):
        u = sequence[at[i]]
        for x in range(type_ptr[u], type_ptr[u + 1]):
            compute[at[i], x - type_ptr[u]] += time_s[types[x], i]
        held[at[i]] += memory[i]
    for t in range(tensors):
        a = at[producer[t]]
        slowest = 0.0
        for x in range(pin_ptr[t], pin_ptr[t + 1]):
            b = at[pins[x]]
            consumers[t, b] += 1
            if consumers[t, b] == 1 and a != b:
                pa, pb = place[sequence[a]], place[sequence[b]]
                wire = latency_s[pa, pb] + tensor_bytes[t] * s_per_byte[pa, pb]
                slowest = max(slowest, wire)
                receive[b] += wire
        send[a] += slowest
    costs = np.zeros(m)
    worst = 0.0
    for s in range(m):
        costs[s] = _stage_cost(s, compute, receive, send, free[sequence[s]], overlap)
        worst = max(worst, costs[s])
    first_costs = costs.copy()
    best = at.copy()
    best_cost = worst
    d_receive = np.zeros(m)
    d_send = np.zeros(m)
    touched = np.empty(m, np.int64)
    found = np.empty(m, np.int64)
    reference = worst
    for step in range(steps):
        i = np.random.randint(n)
        a = at[i]
        low, high = 0, m - 1
        for x in range(before_ptr[i], before_ptr[i + 1]):
            low = max(low, at[before[x]])
        for x in range(after_ptr[i], after_ptr[i + 1]):
            high = min(high, at[after[x]])
        if low == high:
            continue
        b = a
        if np.random.random() < 0.5:
            b = low + np.random.randint(high - low + 1)
        elif np.random.random() < 0.5:
            b = min(high, a + 1)
        else:
            b = max(low, a - 1)
        if a == b:
            continue
        u = sequence[b]
        if held[b] + memory[i] > capacity[u]:
            continue
        runs = True
        for x in range(type_ptr[u], type_ptr[u + 1]):
            runs = runs and time_s[types[x], i] < np.inf
        if not runs:
            continue
        # What the move changes: the tensors that i makes, then those it consumes.
        count = 2
        touched[0], touched[1] = a, b
        stamp += 1
        mark[a] = mark[b] = stamp
        for x in range(out_ptr[i], out_ptr[i + 1]):
            t = outs[x]
            old_slowest, new_slowest = 0.0, 0.0
            places = 0
            for y in range(pin_ptr[t], pin_ptr[t + 1]):
                s = at[pins[y]]
                known = False
                for z in range(places):
                    known = known or found[z] == s
                if known:
                    continue
                found[places] = s
                places += 1
                if mark[s] != stamp:
                    mark[s] = stamp
                    touched[count] = s
                    count += 1
                ps = place[sequence[s]]
                if s != a:
                    pa = place[sequence[a]]
                    wire = latency_s[pa, ps] + tensor_bytes[t] * s_per_byte[pa, ps]
                    d_receive[s] -= wire
                    old_slowest = max(old_slowest, wire)
                if s != b:
                    pb = place[sequence[b]]
                    wire = latency_s[pb, ps] + tensor_bytes[t] * s_per_byte[pb, ps]
                    d_receive[s] += wire
                    new_slowest = max(new_slowest, wire)
            d_send[a] -= old_slowest
            d_send[b] += new_slowest
        for x in range(in_ptr[i], in_ptr[i + 1]):
            t = ins[x]
            p = at[producer[t]]
            leaves = a != p and consumers[t, a] == 1
            joins = b != p and consumers[t, b] == 0
            if not leaves and not joins:
                continue
            if mark[p] != stamp:
                mark[p] = stamp
                touched[count] = p
                count += 1
            pp = place[sequence[p]]
            old_slowest, new_slowest = 0.0, 0.0
            for y in range(pin_ptr[t], pin_ptr[t + 1]):
                s = at[pins[y]]
                if s != p:
                    ps = place[sequence[s]]
                    wire = latency_s[pp, ps] + tensor_bytes[t] * s_per_byte[pp, ps]
                    old_slowest = max(old_slowest, wire)
                    if pins[y] != i:
                        new_slowest = max(new_slowest, wire)
            if leaves:
                pa = place[sequence[a]]
                d_receive[a] -= latency_s[pp, pa] + tensor_bytes[t] * s_per_byte[pp, pa]
            if b != p:
                pb = place[sequence[b]]
                wire = latency_s[pp, pb] + tensor_bytes[t] * s_per_byte[pp, pb]
                new_slowest = max(new_slowest, wire)
                if joins:
                    d_receive[b] += wire
            d_send[p] += new_slowest - old_slowest
        ua, ub = sequence[a], sequence[b]
        for x in range(type_ptr[ua], type_ptr[ua + 1]):
            compute[a, x - type_ptr[ua]] -= time_s[types[x], i]
        for x in range(type_ptr[ub], type_ptr[ub + 1]):
            compute[b, x - type_ptr[ub]] += time_s[types[x], i]
        change = 0.0
        for z in range(count):
            s = touched[z]
            receive[s] += d_receive[s]
            send[s] += d_send[s]
            new = _stage_cost(s, compute, receive, send, free[sequence[s]], overlap)
            change += (new / reference) ** 16 - (costs[s] / reference) ** 16
        temperature = hot * (cold / hot) ** (step / steps)
        if change <= 0 or np.random.random() < np.exp(-change / temperature):
            at[i] = b
            held[a] -= memory[i]
            held[b] += memory[i]
            for x in range(in_ptr[i], in_ptr[i + 1]):
                consumers[ins[x], a] -= 1
                consumers[ins[x], b] += 1
            for z in range(count):
                s = touched[z]
                costs[s] = _stage_cost(s, compute, receive, send, free[sequence[s]], overlap)
            worst = 0.0
            for s in range(m):
                worst = max(worst, costs[s])
            if worst < best_cost * (1 - 1e-12):
                best_cost = worst
                reference = worst
                best[:] = at
        else:
            for x in range(type_ptr[ua], type_ptr[ua + 1]):
                compute[a, x - type_ptr[ua]] += time_s[types[x], i]
            for x in range(type_ptr[ub], type_ptr[ub + 1]):
                compute[b, x - type_ptr[ub]] -= time_s[types[x], i]
            for z in range(count):
                s = touched[z]
                receive[s] -= d_receive[s]
                send[s] -= d_send[s]
        for z in range(count):
            d_receive[touched[z]] = 0.0
            d_send[touched[z]] = 0.0
    return best, best_cost, first_costs


@compiled
def _stage_cost(s, compute, receive, send, free, overlap):
    slowest = 0.0
    for x in range(compute.shape[1]):
        slowest = max(slowest, compute[s, x])
    if free:
        return slowest
    if overlap:
        return max(slowest, receive[s], send[s])
    return slowest + receive[s] + send[s]
