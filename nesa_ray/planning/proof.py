"""Is there a plan below a given bottleneck?  Asked of OR-tools CP-SAT, which finds one or proves that there is none.

Stages stand at positions 0..S-1.  The Booleans are *stage-ordered*: y[i, s] says that item i sits at position s or
later, so precedence u -> v is y[u, s] => y[v, s], and x[i, s] = y[i, s] - y[i, s + 1] is exact.  A tensor made at one
position with its last consumer at another is sent from s when [made at s] - [last consumer at s] is positive, and
received at s by a consumer when [consumed at s] - [made at s] is.  z[s, k] says that position s has a unit of class k.
With unequal links, the places of the producer and of the consumers choose the price; `MAX_PLACES` places at most,
above that every transfer is priced at the cheapest link, which keeps "there is none" true and plans approximate.

All seconds are rounded down to whole ticks, so that "there is none" holds for the real numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from nesa_ray.planning.choices import unit_classes
from nesa_ray.planning.problem import Problem

TICKS = 10**7
FINE_TICKS = 10**10
MAX_PLACES = 4


@dataclass(frozen=True, eq=False)
class Answer:
    """`exists` is None when time ran out.  `unit_of` and `position` describe the plan found.

    effort  CP-SAT's deterministic time, spent
    """

    exists: bool | None
    effort: float
    unit_of: np.ndarray | None = None
    position: np.ndarray | None = None


def find_below(
    problem: Problem,
    target_s: float,
    *,
    stages: int | None = None,
    overlap: bool = False,
    seconds: float = 10.0,
    effort: float = float("inf"),
    seed: int = 0,
    hint: np.ndarray | None = None,
    floor: np.ndarray | None = None,
    ceiling: np.ndarray | None = None,
    fine: bool = False,
) -> Answer:
    """A plan with bottleneck ≤ `target_s`, or the proof that there is none.

    hint            [n] positions to start from
    floor, ceiling  [n] positions each item is held between (then "there is none" is about that neighbourhood only)
    fine            in FINE_TICKS, for when rounding to TICKS makes a plan look better than it is; slower
    effort          CP-SAT's deterministic time, for results that don't depend on the machine
    """
    model = _StageModel(problem, target_s, stages, overlap, FINE_TICKS if fine else TICKS)
    if floor is not None and ceiling is not None:
        model.hold(floor, ceiling)
    if hint is not None:
        model.hint(hint)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    # With coefficients of 5e8 and more, presolve (9.15) calls feasible models infeasible; up to 1e8, or without it, no
    # false answer was seen in thousands of models with known plans.
    solver.parameters.cp_model_presolve = not fine
    solver.parameters.random_seed = seed
    solver.parameters.max_time_in_seconds = max(0.01, seconds)
    if np.isfinite(effort):
        solver.parameters.max_deterministic_time = effort
    status = solver.solve(model.model)
    spent = float(solver.response_proto.deterministic_time)
    if status == cp_model.INFEASIBLE:
        return Answer(False, spent)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, spent)
    position, unit_of = model.read(solver)
    return Answer(True, spent, unit_of, position)


class _StageModel:
    """The Booleans and constraints at the top of the file."""

    def __init__(
        self, problem: Problem, target_s: float, stages: int | None, overlap: bool, ticks: int = TICKS
    ) -> None:
        self.problem, self.target_s, self.overlap = problem, target_s, overlap
        self.model = cp_model.CpModel()
        self.classes = unit_classes(problem)
        self.size = stages or min(len(problem.units), problem.n)
        self.limit = ticks
        self.tick_s = target_s / ticks
        self.places = range(len(problem.latency_s)) if len(problem.latency_s) <= MAX_PLACES else range(0)
        if problem.one_link:
            self.places = range(0)
        self._positions(stages)
        self._units()
        self._transfers()
        self._limits()

    def ticks(self, seconds: float) -> int:
        """Whole ticks, rounded down; more than the target is as good as just more."""
        return int(min(np.floor(seconds / self.tick_s), self.limit + 1))

    def hold(self, floor: np.ndarray, ceiling: np.ndarray) -> None:
        """Keeps every item between two positions."""
        for i in range(self.problem.n):
            for s in range(1, self.size):
                if s <= floor[i]:
                    self._fix(self.y[i][s], 1)
                elif s > ceiling[i]:
                    self._fix(self.y[i][s], 0)

    def hint(self, position: np.ndarray) -> None:
        """Where to look first."""
        for i in range(self.problem.n):
            for s in range(1, self.size):
                if not isinstance(self.y[i][s], int):
                    self.model.add_hint(self.y[i][s], bool(position[i] >= s))

    def read(self, solver: cp_model.CpSolver) -> tuple[np.ndarray, np.ndarray]:
        """(position, unit) of each item in the solution."""
        position = np.array([sum(int(solver.value(v)) for v in row[1 : self.size]) for row in self.y])
        left = [list(units) for units in self.classes]
        unit_at = []
        for s in range(self.size):
            k = next((k for k in range(len(self.classes)) if solver.value(self.z[s][k])), None)
            unit_at.append(left[k].pop(0) if k is not None else -1)
        return position, np.array(unit_at)[position]

    def _fix(self, literal: Any, value: int) -> None:
        if isinstance(literal, int):
            if literal != value:
                self.model.add_bool_or([])
        else:
            self.model.add(literal == value)

    def _positions(self, stages: int | None) -> None:
        problem, model, size = self.problem, self.model, self.size
        earliest, latest = stage_windows(problem, self.target_s, size)
        self.y: list[list[Any]] = []
        for i in range(problem.n):
            row: list[Any] = [1]
            for s in range(1, size):
                row.append(1 if s <= earliest[i] else 0 if s > latest[i] else model.new_bool_var(""))
            self.y.append([*row, 0])
            for s in range(1, size - 1):
                self._implies(row[s + 1], row[s])
        pointer, after = problem.after
        for u in range(problem.n):
            for v in after[pointer[u] : pointer[u + 1]].tolist():
                for s in range(1, size):
                    self._implies(self.y[u][s], self.y[v][s])
        self.x = [[row[s] - row[s + 1] for s in range(size)] for row in self.y]
        if stages is not None:
            for s in range(size):
                model.add(sum(self.x[i][s] for i in range(problem.n)) >= 1)

    def _implies(self, a: Any, b: Any) -> None:
        if (isinstance(a, int) and a == 0) or (isinstance(b, int) and b == 1):
            return
        if isinstance(a, int):
            self._fix(b, 1)
        elif isinstance(b, int):
            self._fix(a, 0)
        else:
            self.model.add_implication(a, b)

    def _units(self) -> None:
        model, problem = self.model, self.problem
        if len(self.classes) == 1:
            self.z: list[list[Any]] = [[1]] * self.size
        else:
            self.z = [[model.new_bool_var("") for _ in self.classes] for _ in range(self.size)]
            for row in self.z:
                model.add_exactly_one(row)
            for k, units in enumerate(self.classes):
                model.add(sum(row[k] for row in self.z) <= len(units))
        self.at: list[list[Any]] = []
        if self.places:
            for row in self.z:
                here = []
                for a in self.places:
                    mine = [row[k] for k, units in enumerate(self.classes) if problem.place[units[0]] == a]
                    if len(mine) == 1:
                        here.append(mine[0])
                    else:
                        literal = model.new_bool_var("")
                        model.add(sum(mine) == literal)
                        here.append(literal)
                self.at.append(here)

    def _transfers(self) -> None:
        """received[s], sent[s]: (tensor, Boolean, Booleans that choose among prices)."""
        problem, model, size = self.problem, self.model, self.size
        self.received: list[list[tuple]] = [[] for _ in range(size)]
        self.sent: list[list[tuple]] = [[] for _ in range(size)]
        made_at: dict[int, list[Any]] = {}
        pointer, pins = problem.pins
        for t, p in enumerate(problem.producer.tolist()):
            consumers = pins[pointer[t] : pointer[t + 1]].tolist()
            if self.places and p not in made_at:
                made_at[p] = [model.new_bool_var("") for _ in self.places]
                model.add_exactly_one(made_at[p])
                for s in range(size):
                    for a in self.places:
                        model.add(made_at[p][a] >= self.x[p][s] + self.at[s][a] - 1)
            arrives = []
            for s in range(size):
                literal = model.new_bool_var("")
                for c in consumers:
                    model.add(literal >= self.x[c][s] - self.x[p][s])
                arrives.append(literal)
            leaves = self._leaves(p, consumers)
            to: list[Any] = []
            if self.places:
                to = [model.new_bool_var("") for _ in self.places]
                for s in range(size):
                    for b in self.places:
                        model.add(to[b] >= arrives[s] + self.at[s][b] - 1)
            for s in range(size):
                origins, ends = [], []
                for a in self.places:
                    origins.append(model.new_bool_var(""))
                    model.add(origins[a] >= arrives[s] + made_at[p][a] - 1)
                    ends.append(model.new_bool_var(""))
                    model.add(ends[a] >= leaves[s] + to[a] - 1)
                self.received[s].append((t, arrives[s], origins))
                self.sent[s].append((t, leaves[s], ends))

    def _leaves(self, p: int, consumers: list[int]) -> list[Any]:
        """Whether the tensor is sent from each position: someone consumes it later, or (a gradient) earlier."""
        model, size, y = self.model, self.size, self.y
        forward = set(self.problem.after[1][self.problem.after[0][p] : self.problem.after[0][p + 1]].tolist())
        ahead = [c for c in consumers if c in forward]
        other = [c for c in consumers if c not in forward]
        leaves = [model.new_bool_var("") for _ in range(size)]
        if ahead:
            last: list[Any] = y[ahead[0]]
            if len(ahead) > 1:
                last = [1, *(model.new_bool_var("") for _ in range(1, size)), 0]
                for s in range(1, size):
                    for c in ahead:
                        self._implies(y[c][s], last[s])
            for s in range(size):
                model.add(leaves[s] >= self.x[p][s] - (last[s] - last[s + 1]))
        for c in other:
            for s in range(size):
                model.add(leaves[s] >= self.x[p][s] - self.x[c][s])
        return leaves

    def _limits(self) -> None:
        """Time and memory of every position, for each class of unit it may have."""
        problem, model = self.problem, self.model
        whole_memory = float(problem.memory_bytes.sum())
        for s in range(self.size):
            for k, units in enumerate(self.classes):
                u = units[0]
                here = self.z[s][k]
                load = [] if problem.free[u] else self._prices(self.received[s], u, send=False)
                out = [] if problem.free[u] else self._prices(self.sent[s], u, send=True)
                for time_s in problem.unit_time_s(u):
                    work = []
                    for i in range(problem.n):
                        if not np.isfinite(time_s[i]):
                            self._when(here, model.add(self.x[i][s] == 0))
                        elif self.ticks(time_s[i]):
                            work.append((self.ticks(time_s[i]), self.x[i][s]))
                    for group in [work, load, out] if self.overlap else [work + load + out]:
                        if group:
                            self._when(here, model.add(sum(c * v for c, v in group) <= self.limit))
                if whole_memory > problem.capacity_bytes[u]:
                    unit = problem.capacity_bytes[u] / 1e9
                    held = [(int(b / unit), self.x[i][s]) for i, b in enumerate(problem.memory_bytes.tolist())]
                    if unit:
                        self._when(here, model.add(sum(c * v for c, v in held if c) <= 10**9 + 1))

    def _when(self, literal: Any, constraint: Any) -> None:
        if not isinstance(literal, int):
            constraint.only_enforce_if(literal)

    def _prices(self, transfers: list[tuple], unit: int, *, send: bool) -> list[tuple[int, Any]]:
        """(ticks, Boolean) terms of one position's receives or sends, on a unit."""
        problem = self.problem
        here = int(problem.place[unit])
        terms: list[tuple[int, Any]] = []
        for t, happens, which in transfers:
            wires = problem.latency_s[here] + problem.tensor_bytes[t] * problem.s_per_byte[here]
            least = self.ticks(float(wires.min()))
            if least:
                terms.append((least, happens))
            if not self.places:
                continue
            extra = [self.ticks(float(w)) - least for w in wires]
            if not send:
                terms += [(extra[a], which[a]) for a in self.places if extra[a] > 0]
                continue
            level = 0
            for e in sorted({e for e in extra if e > 0}):
                slower = [which[b] for b in self.places if extra[b] >= e]
                literal = slower[0]
                if len(slower) > 1:
                    literal = self.model.new_bool_var("")
                    for v in slower:
                        self.model.add_implication(v, literal)
                terms.append((e - level, literal))
                level = e
        return terms


def stage_windows(problem: Problem, target_s: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Earliest and latest position of each item in any plan of `size` positions below `target_s`.

    All ancestors of an item come no later than it, and one position does at most `target_s` of fastest time.
    """
    fastest = problem.time_s.min(axis=0)
    limit = target_s * (1 + 1e-9)
    up = _reach_seconds(problem.n, problem.after, fastest)
    down = _reach_seconds(problem.n, problem.before, fastest)
    earliest = np.maximum(np.ceil(up / limit - 1e-9).astype(int) - 1, 0)
    latest = size - np.maximum(np.ceil(down / limit - 1e-9).astype(int), 1)
    return earliest, latest


def _reach_seconds(n: int, after: tuple[np.ndarray, np.ndarray], seconds: np.ndarray) -> np.ndarray:
    """Seconds of each item and all items it can be reached from along `after`."""
    pointer, values = after
    waiting = np.bincount(values, minlength=n) if len(values) else np.zeros(n, dtype=int)
    sets = [0] * n
    ready = [i for i in range(n) if not waiting[i]]
    total = np.zeros(n)
    while ready:
        v = ready.pop()
        sets[v] |= 1 << v
        bits = np.frombuffer(sets[v].to_bytes((n + 7) // 8, "little"), dtype=np.uint8)
        total[v] = seconds[np.unpackbits(bits, bitorder="little", count=n).astype(bool)].sum()
        for w in values[pointer[v] : pointer[v + 1]].tolist():
            sets[w] |= sets[v]
            waiting[w] -= 1
            if not waiting[w]:
                ready.append(w)
    return total
