# mypy: disable-error-code="var-annotated,no-untyped-def,assignment"
"""Local moves: items go between stages while the stage order stays topological (simulated annealing).

A state gives each item a position in a sequence of units.  A move takes an item to another position, with those of its
ancestors that are later, or of its descendants that are earlier, so every state visited is an acyclic partition.
Costs are exact, unequal links and hyperedges included.  The energy is sum((cost of stage / least so far) ** 16): a
smooth stand-in for the largest stage cost, which alone would not tell most moves apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nesa_ray.planning.compiled import compiled
from nesa_ray.planning.problem import Problem

LARGEST_MOVE = 64
SWAP_EVERY = 256  # steps


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


class Totals(NamedTuple):
    """What each of m positions carries: arrays [m], `compute_s` [m, types of a unit]."""

    compute_s: np.ndarray
    memory_bytes: np.ndarray
    receive_s: np.ndarray
    send_s: np.ndarray
    items: np.ndarray
    cost_s: np.ndarray


def totals(problem: Problem, position: np.ndarray, sequence: np.ndarray, *, overlap: bool = False) -> Totals:
    """Exact totals of an assignment."""
    m = len(sequence)
    pointer, types = problem.unit_types
    compute = np.zeros((m, int(np.diff(pointer).max())))
    for x in range(compute.shape[1]):
        at = np.minimum(pointer[sequence] + x, pointer[sequence + 1] - 1)
        compute[:, x] = np.bincount(
            position, weights=problem.time_s[types[at][position], np.arange(problem.n)], minlength=m
        )
    memory = np.bincount(position, weights=problem.memory_bytes, minlength=m)
    receive, send = np.zeros(m), np.zeros(m)
    tensors = len(problem.producer)
    if tensors:
        tensor = np.repeat(np.arange(tensors), np.diff(problem.pins[0]))
        pairs = np.unique(tensor * m + position[problem.pins[1]])
        tensor, to = pairs // m, pairs % m
        start = position[problem.producer[tensor]]
        tensor, to, start = tensor[to != start], to[to != start], start[to != start]
        here, there = problem.place[sequence[start]], problem.place[sequence[to]]
        wire = problem.latency_s[here, there] + problem.tensor_bytes[tensor] * problem.s_per_byte[here, there]
        receive = np.bincount(to, weights=wire, minlength=m).astype(float)  # of nothing, numpy counts in integers
        slowest = np.zeros(tensors)
        np.maximum.at(slowest, tensor, wire)
        send = np.bincount(position[problem.producer], weights=slowest, minlength=m)
    cost = compute.max(axis=1)
    busy = np.maximum(np.maximum(cost, receive), send) if overlap else cost + receive + send
    cost = np.where(problem.free[sequence], cost, busy)
    return Totals(compute, memory, receive, send, np.bincount(position, minlength=m), cost)


def cost_of(problem: Problem, position: np.ndarray, sequence: np.ndarray, *, overlap: bool = False) -> Assignment:
    """The assignment with its exact cost; positions must respect precedence and memory."""
    return Assignment(position, sequence, float(totals(problem, position, sequence, overlap=overlap).cost_s.max()))


def anneal(
    problem: Problem,
    start: Assignment,
    *,
    steps: int,
    seed: int,
    overlap: bool = False,
    keep: bool = False,
    swap: bool = False,
    hot: float = 0.3,
    cold: float = 0.003,
) -> Assignment:
    """The best assignment met in `steps` random moves, the temperature falling from `hot` to `cold`.

    keep   no position may be left empty
    swap   now and then two positions swap their units
    """
    if start.cost_s == 0:
        return start
    position, sequence = start.position.astype(np.int64), start.sequence.astype(np.int64)
    m = len(sequence)
    begin = totals(problem, position, sequence, overlap=overlap)
    pointer, pins = problem.pins
    consumers = np.bincount(
        np.repeat(np.arange(len(pointer) - 1), np.diff(pointer)) * m + position[pins], minlength=(len(pointer) - 1) * m
    )
    place = problem.place[sequence]
    best = _anneal(
        position, sequence, problem.time_s, problem.memory_bytes, *problem.unit_types,
        problem.capacity_bytes * (1 + 1e-9), problem.free, problem.place, problem.latency_s, problem.s_per_byte,
        problem.latency_s[place[:, None], place], problem.s_per_byte[place[:, None], place], *problem.after,
        *problem.before, problem.producer, problem.tensor_bytes, pointer, pins, *problem.outputs, *problem.inputs,
        begin.compute_s, begin.memory_bytes, begin.receive_s, begin.send_s, begin.items, begin.cost_s,
        consumers.reshape(-1, m), overlap, keep, swap, steps, hot, cold, seed,
    )  # fmt: skip
    return cost_of(problem, best[0], best[1], overlap=overlap)


@compiled
def _anneal(
    start, sequence, time_s, memory, type_ptr, types, capacity, free, place, latency_s, s_per_byte, wire_s,
    wire_per_byte, after_ptr, after, before_ptr, before, producer, tensor_bytes, pin_ptr, pins, out_ptr, outs, in_ptr,
    ins, compute, held, receive, send, items, costs, consumers, overlap, keep, swap, steps, hot, cold, seed,
):  # fmt: skip
    """Returns (best positions, their units); the totals are overwritten."""
    n, m = len(start), len(sequence)
    np.random.seed(seed)
    at = start.copy()
    sequence = sequence.copy()
    best = at.copy()
    best_sequence = sequence.copy()
    best_cost = 0.0
    for s in range(m):
        best_cost = max(best_cost, costs[s])
    mark = np.zeros(m, np.int64)
    visited = np.zeros(n, np.int64)
    touched = np.empty(m, np.int64)
    moved = np.empty(LARGEST_MOVE + 1, np.int64)
    origin = np.empty(LARGEST_MOVE + 1, np.int64)
    for step in range(1, steps + 1):
        if swap and step % SWAP_EVERY == 0:
            a, b = np.random.randint(m), np.random.randint(m)
            fits = a != b and held[a] <= capacity[sequence[b]] and held[b] <= capacity[sequence[a]]
            for i in range(n if fits else 0):
                if at[i] == a or at[i] == b:
                    u = sequence[b] if at[i] == a else sequence[a]
                    for x in range(type_ptr[u], type_ptr[u + 1]):
                        fits = fits and time_s[types[x], i] < np.inf
            if not fits:
                continue
            energy = 0.0
            for attempt in range(2):  # do it, and undo it if it isn't accepted
                sequence[a], sequence[b] = sequence[b], sequence[a]
                for s in range(m):
                    for z in range(2):
                        c = b if z else a
                        wire_s[c, s] = wire_s[s, c] = latency_s[place[sequence[c]], place[sequence[s]]]
                        wire_per_byte[c, s] = s_per_byte[place[sequence[c]], place[sequence[s]]]
                        wire_per_byte[s, c] = wire_per_byte[c, s]
                for s in range(m):
                    receive[s] = 0.0
                    send[s] = 0.0
                    for x in range(compute.shape[1]):
                        compute[s, x] = 0.0
                for i in range(n):
                    u = sequence[at[i]]
                    for x in range(type_ptr[u], type_ptr[u + 1]):
                        compute[at[i], x - type_ptr[u]] += time_s[types[x], i]
                for t in range(len(producer)):
                    c = at[producer[t]]
                    slowest = 0.0
                    width = pin_ptr[t + 1] - pin_ptr[t]
                    for y in range(min(width, m)):
                        s = y if width > m else at[pins[pin_ptr[t] + y]]
                        first = consumers[t, s] > 0 and s != c
                        for z in range(0 if width > m else y):
                            first = first and at[pins[pin_ptr[t] + z]] != s
                        if first:
                            wire = wire_s[c, s] + tensor_bytes[t] * wire_per_byte[c, s]
                            receive[s] += wire
                            slowest = max(slowest, wire)
                    send[c] += slowest
                worst, change = 0.0, -energy
                for s in range(m):
                    energy += _power(costs[s] / best_cost) if attempt == 0 else 0.0
                    costs[s] = _stage_cost(s, compute, receive, send, free[sequence[s]], overlap)
                    change += _power(costs[s] / best_cost)
                    worst = max(worst, costs[s])
                if attempt == 0:
                    change -= energy
                if attempt == 1:
                    break
                if change <= 0 or np.random.random() < np.exp(-change / (hot * (cold / hot) ** (step / steps))):
                    if worst < best_cost * (1 - 1e-12):
                        best_cost = worst
                        for v in range(n):
                            best[v] = at[v]
                        for s in range(m):
                            best_sequence[s] = sequence[s]
                    break
            continue
        i = np.random.randint(n)
        a = at[i]
        b = np.random.randint(m)
        if np.random.random() < 0.7:
            b = a + 1 if np.random.random() < 0.5 else a - 1
        if b < 0 or b >= m or a == b:
            continue
        most = 1 << np.random.randint(7)
        count = carried(
            i, b, most, step, keep, at, visited, moved, origin, sequence, capacity, held, items, memory, time_s,
            type_ptr, types, after_ptr, after, before_ptr, before,
        )  # fmt: skip
        if not count:
            continue
        reached = 0
        accepted = False
        for attempt in range(2):  # do it, and undo it if it isn't accepted
            if accepted:
                break
            for z in range(count):
                i = moved[z]
                a = at[i]
                to = origin[z] if attempt else b
                for end in range(2):
                    s = to if end else a
                    if mark[s] != step:
                        mark[s] = step
                        touched[reached] = s
                        reached += 1
                    sign = 1.0 if end else -1.0
                    u = sequence[s]
                    for x in range(type_ptr[u], type_ptr[u + 1]):
                        compute[s, x - type_ptr[u]] += sign * time_s[types[x], i]
                    held[s] += sign * memory[i]
                    items[s] += 1 if end else -1
                for x in range(out_ptr[i], out_ptr[i + 1]):
                    t = outs[x]
                    old_slowest, new_slowest = 0.0, 0.0
                    width = pin_ptr[t + 1] - pin_ptr[t]
                    many = width > m
                    for y in range(m if many else width):
                        s = y if many else at[pins[pin_ptr[t] + y]]
                        again = many and consumers[t, s] == 0
                        if not many:
                            for w in range(pin_ptr[t], pin_ptr[t] + y):
                                if at[pins[w]] == s:
                                    again = True
                                    break
                        if again:
                            continue
                        if mark[s] != step:
                            mark[s] = step
                            touched[reached] = s
                            reached += 1
                        if s != a:
                            wire = wire_s[a, s] + tensor_bytes[t] * wire_per_byte[a, s]
                            receive[s] -= wire
                            old_slowest = max(old_slowest, wire)
                        if s != to:
                            wire = wire_s[to, s] + tensor_bytes[t] * wire_per_byte[to, s]
                            receive[s] += wire
                            new_slowest = max(new_slowest, wire)
                    send[a] -= old_slowest
                    send[to] += new_slowest
                for x in range(in_ptr[i], in_ptr[i + 1]):
                    t = ins[x]
                    p = at[producer[t]]
                    consumers[t, a] -= 1
                    consumers[t, to] += 1
                    leaves = a != p and consumers[t, a] == 0
                    joins = to != p and consumers[t, to] == 1
                    if not leaves and not joins:
                        continue
                    if mark[p] != step:
                        mark[p] = step
                        touched[reached] = p
                        reached += 1
                    old_slowest, new_slowest = 0.0, 0.0
                    width = pin_ptr[t + 1] - pin_ptr[t]
                    many = width > m
                    at[i] = to
                    for y in range(m if many else width):
                        s = y if many else at[pins[pin_ptr[t] + y]]
                        if s != p and consumers[t, s] > 0:
                            wire = wire_s[p, s] + tensor_bytes[t] * wire_per_byte[p, s]
                            new_slowest = max(new_slowest, wire)
                            if s != to or not joins:
                                old_slowest = max(old_slowest, wire)
                    at[i] = a
                    if leaves:
                        wire = wire_s[p, a] + tensor_bytes[t] * wire_per_byte[p, a]
                        receive[a] -= wire
                        old_slowest = max(old_slowest, wire)
                    if joins:
                        receive[to] += wire_s[p, to] + tensor_bytes[t] * wire_per_byte[p, to]
                    send[p] += new_slowest - old_slowest
                at[i] = to
            if attempt == 1:
                break
            change = 0.0
            for z in range(reached):
                s = touched[z]
                change += _power(
                    _stage_cost(s, compute, receive, send, free[sequence[s]], overlap) / best_cost
                ) - _power(costs[s] / best_cost)
            accepted = change <= 0 or np.random.random() < np.exp(-change / (hot * (cold / hot) ** (step / steps)))
        if accepted:
            for z in range(reached):
                s = touched[z]
                costs[s] = _stage_cost(s, compute, receive, send, free[sequence[s]], overlap)
            worst = 0.0
            for s in range(m):
                worst = max(worst, costs[s])
            if worst < best_cost * (1 - 1e-12):
                best_cost = worst
                for v in range(n):
                    best[v] = at[v]
                for s in range(m):
                    best_sequence[s] = sequence[s]
    return best, best_sequence


@compiled
def carried(
    i, b, most, step, keep, at, visited, moved, origin, sequence, capacity, held, items, memory, time_s, type_ptr,
    types, after_ptr, after, before_ptr, before,
):  # fmt: skip
    """How many items move when i goes to position b; 0 where they can't, or are more than `most`.

    They are the item and what must go with it: its ancestors that are later than b, or descendants that are earlier.
    `moved` and `origin` get them and their positions; with `keep` no position may lose its last item.
    """
    back = b < at[i]
    count = 1
    moved[0] = i
    visited[i] = step
    done = 0
    while done < count <= most:
        v = moved[done]
        done += 1
        first = before_ptr[v] if back else after_ptr[v]
        last = before_ptr[v + 1] if back else after_ptr[v + 1]
        for x in range(first, last):
            w = before[x] if back else after[x]
            if visited[w] != step and (at[w] > b if back else at[w] < b):
                visited[w] = step
                if count > most:
                    break
                moved[count] = w
                count += 1
    if count > most:
        return 0
    u = sequence[b]
    fits = held[b]
    for z in range(count):
        origin[z] = at[moved[z]]
        fits += memory[moved[z]]
        for x in range(type_ptr[u], type_ptr[u + 1]):
            if time_s[types[x], moved[z]] == np.inf:
                fits = np.inf
    if fits > capacity[u]:
        return 0
    if keep:
        for z in range(count):
            items[origin[z]] -= 1
        empties = False
        for z in range(count):
            empties = empties or items[origin[z]] == 0
        for z in range(count):
            items[origin[z]] += 1
        if empties:
            return 0
    return count


@compiled
def _power(x):
    """x ** 16."""
    x = x * x
    x = x * x
    x = x * x
    return x * x


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
