"""Optimal slicing of one topological order into stages, by dynamic programming over (choices made, items placed).

Every acyclic partition is a slicing of some topological order (MTPP, arXiv 2311.03703), so the planner's search is over
orders.  With f[q, i] the least bottleneck of the first i items with the automaton of `choices` in state q,

    f[q', i] = min over h < i, transitions q -> q'  of  max(f[q, h], cost of items h..i-1 on that unit).

Communication is exact for hyperedges: a tensor is received once by a stage that consumes it and sent once, by the
slowest transfer.  With one kind of link the slicing is optimal for its order.  With unequal links a tensor that skips
over a stage is priced as if it came from, or went to, the neighbouring stage; the caller re-costs the result.
Only segments whose compute stays below a ceiling are looked at; the ceiling rises until a slicing exists below it.
"""

# mypy: disable-error-code="var-annotated,no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nesa_ray.planning.choices import Choices
from nesa_ray.planning.compiled import compiled
from nesa_ray.planning.problem import Problem

# Where a tensor of a segment comes from or goes to.
IN_BEFORE, IN_AFTER, OUT_BEFORE, OUT_AFTER, OUT_BOTH = range(5)


@dataclass(frozen=True, eq=False)
class Slicing:
    """Stages of one order: `cost_s` as the dynamic program prices it, and the unit of each item."""

    cost_s: float
    unit_of: np.ndarray


class Slicer:
    """Slices orders of one problem with one automaton.  `overlap` takes the largest of the three costs of a stage."""

    def __init__(self, problem: Problem, choices: Choices, *, overlap: bool = False) -> None:
        self.problem, self.choices, self.overlap = problem, choices, overlap
        examples = [units[0] for units in choices.classes]
        pointer, types = problem.unit_types
        self.class_types = (
            np.cumsum([0] + [int(pointer[u + 1] - pointer[u]) for u in examples]),
            np.concatenate([types[pointer[u] : pointer[u + 1]] for u in examples]),
        )
        self.capacity = problem.capacity_bytes[examples] * (1 + 1e-9)
        self.free = problem.free[examples]
        self.rows, self.values, self.receive, self.send = self._prices()
        finite = np.where(np.isfinite(problem.time_s), problem.time_s, 0.0)
        self.finite_time_s = finite
        self.fastest_s = problem.time_s.min(axis=0)
        self.ceiling_s = float(finite.max(axis=0).sum()) + 2 * float(
            (problem.latency_s.max() + problem.tensor_bytes * problem.s_per_byte.max()).sum() * len(choices.classes)
        ) * max(1, len(problem.units))
        self.guess_s = max(float(self.fastest_s.max()), float(self.fastest_s.sum()) / len(problem.units))

    def _prices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(row of each role, values of each tensor, receive and send seconds per row and transition)."""
        problem, choices = self.problem, self.choices
        edges = len(choices.source)
        pays = np.array([k >= 0 and not self.free[k] for k in choices.unit_class], dtype=float)
        if problem.one_link:
            seconds = problem.latency_s[0, 0] + problem.tensor_bytes * problem.s_per_byte[0, 0]
            rows = np.array([0, 0, 1, 1, 1])
            receive, send = np.zeros((edges, 2)), np.zeros((edges, 2))
            receive[:, 0], send[:, 1] = pays, pays
            return rows, seconds.reshape(-1, 1), receive, send
        rows = np.arange(5)
        values = np.stack([np.ones(len(problem.tensor_bytes)), problem.tensor_bytes], axis=1)
        receive, send = np.zeros((edges, 10)), np.zeros((edges, 10))
        examples = [units[0] for units in choices.classes]
        for e in range(edges):
            if not pays[e]:
                continue
            here = int(problem.place[examples[choices.unit_class[e]]])
            for column, table in enumerate((problem.latency_s, problem.s_per_byte)):
                before, after = (
                    float(table[here, p]) if p >= 0 else 0.0 for p in (choices.place_before[e], choices.place_after[e])
                )
                receive[e, 2 * IN_BEFORE + column] = before
                receive[e, 2 * IN_AFTER + column] = after
                send[e, 2 * OUT_BEFORE + column] = before
                send[e, 2 * OUT_AFTER + column] = after
                send[e, 2 * OUT_BOTH + column] = max(before, after)
        return rows, values, receive, send

    def slice(self, order: np.ndarray, below_s: float | None = None) -> Slicing | None:
        """The best slicing of `order`; None when there is none (strictly below `below_s`, if given)."""
        limit = below_s if below_s is not None else max(self.guess_s * 1.05, 1e-12)
        while True:
            found = self._slice(order, limit)
            if found is not None or below_s is not None or limit > self.ceiling_s:
                return found
            limit *= 1.3

    def _slice(self, order: np.ndarray, limit_s: float) -> Slicing | None:
        problem, choices = self.problem, self.choices
        position = np.empty(problem.n, dtype=np.int64)
        position[order] = np.arange(problem.n)
        elapsed = np.zeros((len(problem.time_s), problem.n + 1))
        np.cumsum(self.finite_time_s[:, order], axis=1, out=elapsed[:, 1:])
        fastest = np.concatenate([[0.0], np.cumsum(self.fastest_s[order])])
        memory = np.concatenate([[0.0], np.cumsum(problem.memory_bytes[order])])
        offset, parts = _segments(
            order, position, fastest, limit_s, problem.producer, *problem.pins, *problem.outputs, *problem.inputs,
            self.values, self.rows,
        )  # fmt: skip
        cost, chosen_h, chosen_e, state = _best_slicing(
            offset, parts, elapsed, _runs_until(problem.time_s[:, order]), memory, limit_s, self.overlap,
            *self.class_types, self.capacity, choices.states, choices.source, choices.target, choices.unit_class,
            self.receive, self.send, choices.starts, choices.ends,
        )  # fmt: skip
        if state < 0:
            return None
        unit_of = np.empty(problem.n, dtype=np.int64)
        left = [list(units) for units in choices.classes]
        i = problem.n
        while i > 0 or chosen_e[state, i] >= 0:
            e, h = int(chosen_e[state, i]), int(chosen_h[state, i])
            k = int(choices.unit_class[e])
            if k >= 0:
                unit_of[order[h:i]] = left[k].pop()
            state, i = int(choices.source[e]), h
        return Slicing(cost, unit_of)


def _runs_until(time_s: np.ndarray) -> np.ndarray:
    """[K, n] the first position at or after each one that the type can't run (n where it can run them all)."""
    n = time_s.shape[1]
    blocked = np.where(np.isfinite(time_s), n, np.arange(n))
    return np.minimum.accumulate(blocked[:, ::-1], axis=1)[:, ::-1]


@compiled
def _segments(order, position, fastest, limit_s, producer, pin_ptr, pins, out_ptr, outs, in_ptr, ins, values, rows):
    """Communication of every segment h..i-1 whose fastest compute stays within the limit.

    Returns offset [n+1] and parts [rows * columns, segments]; segment (h, i) is at offset[h] + i - h - 1.
    """
    n, tensors, columns = len(order), len(producer), values.shape[1]
    offset = np.zeros(n + 1, np.int64)
    end = 0
    for h in range(n):
        end = max(end, h + 1)
        while end < n and fastest[end + 1] - fastest[h] <= limit_s:
            end += 1
        offset[h + 1] = offset[h] + end - h
    first = np.full(tensors, n, np.int64)
    last = np.full(tensors, -1, np.int64)
    at = np.empty(tensors, np.int64)
    for t in range(tensors):
        at[t] = position[producer[t]]
        for c in range(pin_ptr[t], pin_ptr[t + 1]):
            p = position[pins[c]]
            first[t] = min(first[t], p)
            last[t] = max(last[t], p)
    height = 1
    for r in rows:
        height = max(height, r + 1)
    parts = np.empty((height * columns, offset[n]))
    seen = np.full(tensors, -1, np.int64)
    role = np.full(tensors, -1, np.int64)
    total = np.zeros(height * columns)
    for h in range(n):
        total[:] = 0.0
        for i in range(h, h + offset[h + 1] - offset[h]):
            item = order[i]
            for x in range(in_ptr[item], in_ptr[item + 1]):
                t = ins[x]
                if at[t] < h or at[t] > i:
                    if seen[t] != h:
                        seen[t] = h
                        row = rows[0] if at[t] < h else rows[1]
                        for c in range(columns):
                            total[row * columns + c] += values[t, c]
                elif last[t] == i and role[t] >= 0:
                    row = rows[role[t]]
                    for c in range(columns):
                        total[row * columns + c] -= values[t, c]
                    role[t] = -1
                    if first[t] < h:
                        role[t] = 2
                        row = rows[2]
                        for c in range(columns):
                            total[row * columns + c] += values[t, c]
            for x in range(out_ptr[item], out_ptr[item + 1]):
                t = outs[x]
                if seen[t] == h:
                    row = rows[1]
                    for c in range(columns):
                        total[row * columns + c] -= values[t, c]
                role[t] = -1
                if first[t] < h:
                    role[t] = 4 if last[t] > i else 2
                elif last[t] > i:
                    role[t] = 3
                if role[t] >= 0:
                    row = rows[role[t]]
                    for c in range(columns):
                        total[row * columns + c] += values[t, c]
            for r in range(len(total)):
                parts[r, offset[h] + i - h] = total[r]
    return offset, parts


@compiled
def _best_slicing(
    offset, parts, elapsed, runs_until, memory, limit_s, overlap, type_ptr, types, capacity, states,
    source, target, unit_class, receive, send, starts, ends,
):  # fmt: skip
    """The recurrence at the top of the file.  Returns (cost, chosen start [S, n+1], transition [S, n+1], end state)."""
    n = elapsed.shape[1] - 1
    best = np.full((states, n + 1), np.inf)
    chosen_h = np.full((states, n + 1), -1, np.int32)
    chosen_e = np.full((states, n + 1), -1, np.int32)
    for q in range(states):
        if starts[q]:
            best[q, 0] = 0.0
    reached = np.zeros(states, np.int64)  # no state has items beyond this placed
    width = parts.shape[0]
    for e in range(len(source)):
        q, to, k = source[e], target[e], unit_class[e]
        if k < 0:
            reached[to] = max(reached[to], reached[q])
            for i in range(reached[q] + 1):
                if best[q, i] < best[to, i]:
                    best[to, i] = best[q, i]
                    chosen_h[to, i] = i
                    chosen_e[to, i] = e
            continue
        for h in range(min(n, reached[q] + 1)):
            so_far = best[q, h]
            if so_far >= limit_s:
                continue
            stop = h + offset[h + 1] - offset[h]
            for x in range(type_ptr[k], type_ptr[k + 1]):
                stop = min(stop, runs_until[types[x], h])
            for i in range(h + 1, stop + 1):
                if memory[i] - memory[h] > capacity[k]:
                    break
                compute = 0.0
                for x in range(type_ptr[k], type_ptr[k + 1]):
                    compute = max(compute, elapsed[types[x], i] - elapsed[types[x], h])
                if compute >= limit_s:
                    break
                at = offset[h] + i - h - 1
                receiving, sending = 0.0, 0.0
                for r in range(width):
                    receiving += receive[e, r] * parts[r, at]
                    sending += send[e, r] * parts[r, at]
                cost = max(compute, max(receiving, sending)) if overlap else compute + receiving + sending
                cost = max(cost, so_far)
                if cost < limit_s and cost < best[to, i]:
                    best[to, i] = cost
                    reached[to] = max(reached[to], i)
                    chosen_h[to, i] = h
                    chosen_e[to, i] = e
    state = -1
    cost = np.inf
    for q in range(states):
        if ends[q] and best[q, n] < cost:
            cost, state = best[q, n], q
    return cost, chosen_h, chosen_e, state
