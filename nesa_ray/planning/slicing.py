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

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nesa_ray.planning.choices import EARLIER, LAST, LATER, NEXT, Choices
from nesa_ray.planning.compiled import compiled
from nesa_ray.planning.problem import Problem

SEGMENTS_PER_S = 2e8  # looked at, about

# Where a tensor of a segment comes from (4 wires of `choices`), or goes to: none or one of the wires before, times
# none or one of those after.
IN_LAST, IN_EARLIER, IN_NEXT, IN_LATER = LAST, EARLIER, NEXT, LATER
OUT_BEFORE, OUT_AFTER, OUT_BOTH = 4 + 3 * 1, 4 + 1, 4 + 3 * 1 + 1
ROLES = 4 + 9
CHAIN = (IN_LAST, IN_NEXT, OUT_BEFORE, OUT_AFTER, OUT_BOTH)  # those that an order's segments have


@dataclass(frozen=True, eq=False)
class Slicing:
    """Stages of one order: `cost_s` as the dynamic program prices it, and the unit of each item."""

    cost_s: float
    unit_of: np.ndarray


class Slicer:
    """Slices orders of one problem with one automaton.

    `overlap` takes the largest of the three costs of a stage; `roles` are those that the segments' tensors will have.
    """

    def __init__(
        self, problem: Problem, choices: Choices, *, overlap: bool = False, roles: Sequence[int] = CHAIN
    ) -> None:
        self.problem, self.choices, self.overlap = problem, choices, overlap
        examples = [units[0] for units in choices.classes]
        pointer, types = problem.unit_types
        self.class_types = (
            np.cumsum([0] + [int(pointer[u + 1] - pointer[u]) for u in examples]),
            np.concatenate([types[pointer[u] : pointer[u + 1]] for u in examples]),
        )
        self.capacity = problem.capacity_bytes[examples] * (1 + 1e-9)
        self.free = problem.free[examples]
        self.rows, self.values, self.receive, self.send = self._prices(list(roles))
        finite = np.where(np.isfinite(problem.time_s), problem.time_s, 0.0)
        self.finite_time_s = finite
        self.fastest_s = problem.time_s.min(axis=0)
        self.ceiling_s = float(finite.max(axis=0).sum()) + 2 * float(
            (problem.latency_s.max() + problem.tensor_bytes * problem.s_per_byte.max()).sum() * len(choices.classes)
        ) * max(1, len(problem.units))
        self.guess_s = max(float(self.fastest_s.max()), float(self.fastest_s.sum()) / len(problem.units))

    def _prices(self, roles: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(row of each role, values of each tensor, receive and send seconds per row and transition)."""
        problem, choices = self.problem, self.choices
        edges = len(choices.source)
        pays = np.array([k >= 0 and not self.free[k] for k in choices.unit_class], dtype=bool)
        if problem.one_link:
            seconds = problem.latency_s[0, 0] + problem.tensor_bytes * problem.s_per_byte[0, 0]
            rows = np.array([0] * 4 + [1] * 9)
            receive, send = np.zeros((edges, 2)), np.zeros((edges, 2))
            receive[:, 0], send[:, 1] = pays, pays
            return rows, seconds.reshape(-1, 1), receive, send
        values = np.stack([np.ones(len(problem.tensor_bytes)), problem.tensor_bytes], axis=1)
        receive, send = np.zeros((edges, ROLES, 2)), np.zeros((edges, ROLES, 2))
        receive[:, :4] = choices.wires
        for b, before in enumerate((None, LAST, EARLIER)):
            for a, after in enumerate((None, NEXT, LATER)):
                ends = [choices.wires[:, w] for w in (before, after) if w is not None]
                if len(ends) == 2:  # to both: by the slower, where one is slower in everything
                    slower = (ends[1] >= ends[0]).all(axis=1, keepdims=True)
                    ends = [np.where(slower, ends[1], ends[0])]
                if ends:
                    send[:, 4 + 3 * b + a] = ends[0]
        receive, send = (x[:, roles] * pays[:, None, None] for x in (receive, send))
        rows = np.full(ROLES, -1)
        rows[roles] = np.arange(len(roles))
        return rows, values, receive.reshape(edges, -1), send.reshape(edges, -1)

    def slice(
        self, order: np.ndarray, below_s: float | None = None, *, guess_s: float = 0.0, deadline: float = np.inf
    ) -> Slicing | None:
        """The best slicing of `order`; None when there is none (strictly below `below_s`, if given).

        `guess_s` is about what to expect: without it, what no slicing is below.  It gives up rather than begin what
        isn't likely to end before `deadline` (a time.perf_counter() value).
        """
        limit = below_s if below_s is not None else max(self.guess_s * 1.05, guess_s, 1e-12)
        while True:
            if np.isfinite(deadline) and time.perf_counter() + self._expected_s(order, limit) > deadline:
                return None
            found = self._slice(order, limit)
            if found is not None or below_s is not None or limit > self.ceiling_s:
                return found
            limit *= 1.3

    def _expected_s(self, order: np.ndarray, limit_s: float) -> float:
        """About how long `_slice` takes: every transition looks at every segment within the limit."""
        fastest = np.concatenate([[0.0], np.cumsum(self.fastest_s[order])])
        segments = np.searchsorted(fastest, fastest + limit_s, side="right") - np.arange(len(fastest))
        return float(segments.sum()) * (len(self.choices.source) + 1) / SEGMENTS_PER_S

    def _slice(self, order: np.ndarray, limit_s: float) -> Slicing | None:
        problem = self.problem
        position = np.empty(problem.n, dtype=np.int64)
        position[order] = np.arange(problem.n)
        elapsed, blocked = np.zeros((2, len(problem.time_s), problem.n + 1))
        np.cumsum(self.finite_time_s[:, order], axis=1, out=elapsed[:, 1:])
        np.cumsum(np.isinf(problem.time_s[:, order]), axis=1, out=blocked[:, 1:])
        fastest = np.concatenate([[0.0], np.cumsum(self.fastest_s[order])])
        memory = np.concatenate([[0.0], np.cumsum(problem.memory_bytes[order])])
        offset, parts = _segments(
            order, position, fastest, limit_s, problem.producer, *problem.pins, *problem.outputs, *problem.inputs,
            self.values, self.rows,
        )  # fmt: skip
        found = self.best_path(offset, None, parts, elapsed, blocked, memory, limit_s)
        if found is None:
            return None
        cost, steps = found
        unit_of = np.empty(problem.n, dtype=np.int64)
        for unit, h, i in steps:
            unit_of[order[h:i]] = unit
        return Slicing(cost, unit_of)

    def best_path(
        self, offset: np.ndarray, to: np.ndarray | None, parts: np.ndarray, elapsed: np.ndarray, blocked: np.ndarray,
        memory: np.ndarray, limit_s: float,
    ) -> tuple[float, list[tuple[int, int, int]]] | None:  # fmt: skip
        """(bottleneck, [(unit, from, to)]) of the best way from the first to the last of the places between items.

        elapsed, blocked  [K, places] seconds of the items before each place by device type, and those it can't run
        memory            [places] bytes of the items before
        offset            [places] where the segments that start at each place begin
        to                [segments] the place each ends at; None: h + 1, h + 2, …
        parts             [rows * columns, segments] what each receives and sends, by role

        None where nothing is below `limit_s`.
        """
        choices = self.choices
        chain = to is None
        cost, chosen_h, chosen_e, state = _best_slicing(
            offset, np.zeros(1, np.int64) if to is None else to, chain, parts, elapsed, blocked, memory, limit_s,
            self.overlap, *self.class_types, self.capacity, choices.states, choices.source, choices.target,
            choices.unit_class, self.receive, self.send, choices.starts, choices.ends,
        )  # fmt: skip
        if state < 0:
            return None
        left = [list(units) for units in choices.classes]
        steps: list[tuple[int, int, int]] = []
        i = len(memory) - 1
        while i > 0 or chosen_e[state, i] >= 0:
            e, h = int(chosen_e[state, i]), int(chosen_h[state, i])
            k = int(choices.unit_class[e])
            if k >= 0:
                steps.append((left[k].pop(), h, i))
            state, i = int(choices.source[e]), h
        return float(cost), steps[::-1]


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
                        row = rows[IN_LAST] if at[t] < h else rows[IN_NEXT]
                        for c in range(columns):
                            total[row * columns + c] += values[t, c]
                elif last[t] == i and role[t] >= 0:
                    row = rows[role[t]]
                    for c in range(columns):
                        total[row * columns + c] -= values[t, c]
                    role[t] = -1
                    if first[t] < h:
                        role[t] = OUT_BEFORE
                        row = rows[OUT_BEFORE]
                        for c in range(columns):
                            total[row * columns + c] += values[t, c]
            for x in range(out_ptr[item], out_ptr[item + 1]):
                t = outs[x]
                if seen[t] == h:
                    row = rows[IN_NEXT]
                    for c in range(columns):
                        total[row * columns + c] -= values[t, c]
                role[t] = -1
                if first[t] < h:
                    role[t] = OUT_BOTH if last[t] > i else OUT_BEFORE
                elif last[t] > i:
                    role[t] = OUT_AFTER
                if role[t] >= 0:
                    row = rows[role[t]]
                    for c in range(columns):
                        total[row * columns + c] += values[t, c]
            for r in range(len(total)):
                parts[r, offset[h] + i - h] = total[r]
    return offset, parts


@compiled
def _best_slicing(
    offset, ends_at, chain, parts, elapsed, blocked, memory, limit_s, overlap, type_ptr, types, capacity, states,
    source, target, unit_class, receive, send, starts, ends,
):  # fmt: skip
    """The recurrence at the top of the file.  Returns (cost, chosen start [S, places], transition, end state)."""
    n = elapsed.shape[1] - 1
    best = np.full((states, n + 1), np.inf)
    chosen_h = np.full((states, n + 1), -1, np.int32)
    chosen_e = np.full((states, n + 1), -1, np.int32)
    for q in range(states):
        if starts[q]:
            best[q, 0] = 0.0
    reached = np.zeros(states, np.int64)  # no state has reached a place beyond this
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
            for at in range(offset[h], offset[h + 1]):
                i = h + 1 + at - offset[h] if chain else ends_at[at]
                fits = memory[i] - memory[h] <= capacity[k]
                compute = 0.0
                for x in range(type_ptr[k], type_ptr[k + 1]):
                    compute = max(compute, elapsed[types[x], i] - elapsed[types[x], h])
                    fits = fits and blocked[types[x], i] == blocked[types[x], h]
                if compute >= limit_s or not fits:
                    if chain:
                        break
                    continue
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
