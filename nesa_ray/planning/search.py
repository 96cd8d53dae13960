"""The any-time search for the least bottleneck: slice good orders, move items, ask for a proof, repeat.

A round starts from the best plan or from a random depth-first order, slices it optimally, anneals it, and slices again
along orders near the result.  Rounds are counted, not timed, so that a seed gives the same plan wherever the time
suffices.  Where the problem is small enough for CP-SAT, it is asked early for anything better: it mostly answers with
the proof that there is nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from nesa_ray.errors import Infeasible
from nesa_ray.planning.choices import by_class, by_sequence, states_by_class, unit_classes
from nesa_ray.planning.coarsen import merge_segments
from nesa_ray.planning.ideals import slice_all_orders
from nesa_ray.planning.moves import Assignment, anneal, cost_of, totals
from nesa_ray.planning.orders import first_order, narrow_order, natural_order, order_by, random_order
from nesa_ray.planning.paths import promising_paths
from nesa_ray.planning.problem import Problem
from nesa_ray.planning.proof import find_below
from nesa_ray.planning.slicing import Slicer, Slicing

FEW_STATES = 512
MAX_STATES, STATE_ITEMS = 4096, 800_000  # states of the automaton, times items
MOST_PARTS = 300  # segments that a large problem is planned over first
COARSE_SIZE = 1_000_000  # items × units up to which that is done
COARSE_SHARE = 0.3  # of the time, for that
PATH_SHARE = 0.3
STEPS = 100_000
ROUNDS = 60
TOLERANCE = 1e-9
MARGINS = (1e-2, 1e-3, 1e-7)
PROVED_WITHIN = 1e-6
BY_CP_SAT = "CP-SAT: no plan is below it"
HARD_PROOF = 12_000  # Booleans (items × positions) above which CP-SAT isn't asked for plans
NO_BOUND = 60_000  # Booleans above which it isn't asked for bounds either
EASY_PROOF = 6_000  # Booleans up to which the proof gets the larger part of the time
FIRST_PROOF = 0.5  # CP-SAT's deterministic seconds, before anything but slicing
QUICK_PROOF = 3.0  # CP-SAT's deterministic seconds, before the long rounds
SCATTERED = 400
SCATTER_SIZE = 20_000  # items × units up to which random starts are tried
SEARCH_SHARE, PROOF_SHARE = 0.5, 0.8  # of the time, where a proof is in reach; the rest is for the bound
TERMS_PER_S = 60_000  # items × positions × classes of units that CP-SAT's model is built from in a second
SMALL = 64  # items up to which a proof is quick whatever the start
SLOW_SLICING = 2_000_000  # transitions × items from which an order is sliced only now and then
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Limits:
    """What a search may do.  `deadline` is a time.perf_counter() value; `report(what, seconds of the best)`."""

    deadline: float
    stages: int | None = None
    overlap: bool = False
    seed: int = 0
    prove: bool = True
    rounds: int = ROUNDS
    report: Report | None = field(default=None, compare=False)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()


@dataclass(frozen=True, eq=False)
class Found:
    """The best assignment, and the bottleneck below which nothing is (0: unknown), with the proof's name."""

    assignment: Assignment
    bound_s: float = 0.0
    bound_by: str = ""
    proved: bool = False


def search(problem: Problem, limits: Limits) -> Found:
    """The best assignment found.  Raises Infeasible when there is none, or none was found in time."""
    return _Search(problem, limits).run()


class _Search:
    def __init__(self, problem: Problem, limits: Limits) -> None:
        self.problem, self.limits = problem, limits
        self.started, self.seconds = time.perf_counter(), limits.left_s
        self.rng = np.random.default_rng(limits.seed)
        self.swap = not problem.one_link or len(unit_classes(problem)) > 1
        many = not problem.one_link or len(unit_classes(problem)) > 2
        self.scatter = many and problem.n * len(problem.units) <= SCATTER_SIZE
        self.best: Assignment | None = None
        self.bound_s, self.bound_by = 0.0, ""

    def run(self) -> Found:
        problem, limits = self.problem, self.limits
        if limits.stages is not None and limits.stages > problem.n:
            raise Infeasible(
                f"stages: {limits.stages} stages asked for, the graph has {problem.n} nodes that can be separated"
            )
        self.by_sequence = False
        self.slicer = Slicer(problem, self._choices(), overlap=limits.overlap)
        self.slow = len(self.slicer.choices.source) * problem.n > SLOW_SLICING
        self.iteration = 0
        starts = self._starts(self._coarse_starts() + self._path_starts())
        if not starts:
            return self._last_resort()
        self.best = starts[0]
        size = problem.n * min(len(problem.units), problem.n)
        if limits.prove and size <= EASY_PROOF and self._prove(FIRST_PROOF, moves=False):
            return self._found()
        for start in starts[:3]:
            self._improve(start, 1)
        if limits.prove and self._all_orders():
            return self._found()
        if self.scatter and problem.n > SMALL:
            self._scatter(SCATTERED)
        if not limits.prove or size > HARD_PROOF:
            self._until(1.0 if not limits.prove or size > NO_BOUND else PROOF_SHARE)
            self._rounds(limits.rounds)
            return self._found()
        if not self._prove(QUICK_PROOF if problem.n <= SMALL or problem.one_link else QUICK_PROOF / 6):
            self._until(SEARCH_SHARE if size > EASY_PROOF else SEARCH_SHARE / 2)
            self._rounds(limits.rounds)
            self._until(PROOF_SHARE)
            self._prove(np.inf)
        return self._found()

    def _found(self) -> Found:
        assert self.best is not None
        proved = self.bound_s >= self.best.cost_s * (1 - PROVED_WITHIN)
        return Found(self.best, min(self.bound_s, self.best.cost_s), self.bound_by, proved)

    def _until(self, share: float) -> None:
        """What follows ends when that share of the time is spent."""
        self.limits = replace(self.limits, deadline=self.started + share * self.seconds)

    def _report(self, what: str) -> None:
        if self.limits.report is not None and self.best is not None:
            self.limits.report(what, self.best.cost_s)

    def _choices(self):  # type: ignore[no-untyped-def]
        problem, stages = self.problem, self.limits.stages
        states = states_by_class(problem)
        if states <= FEW_STATES or (states <= MAX_STATES and states * problem.n <= STATE_ITEMS):
            return by_class(problem, stages)
        self.by_sequence = True
        speed = [float(problem.unit_time_s(u).max(axis=0).sum()) for u in range(len(problem.units))]
        sequence = sorted(range(len(problem.units)), key=lambda u: (int(problem.place[u]), speed[u], u))
        return by_sequence(problem, sequence, stages)

    def _assignment(self, slicing: Slicing, order: np.ndarray) -> Assignment:
        """Positions in the order stages appear; units left out follow, empty, unless the stages are counted."""
        along = slicing.unit_of[order]
        starts = np.concatenate([[True], along[1:] != along[:-1]])
        used = along[starts]
        where: np.ndarray = np.empty(len(self.problem.units), dtype=np.int64)
        where[used] = np.arange(len(used))
        position = where[slicing.unit_of]
        rest = [] if self.limits.stages else sorted(set(range(len(self.problem.units))) - set(used.tolist()))
        sequence = np.concatenate([used, np.array(rest, dtype=np.int64)])
        return cost_of(self.problem, position, sequence, overlap=self.limits.overlap)

    def _coarse_starts(self) -> list[Assignment]:
        """A large problem planned over segments of an order first."""
        problem, limits = self.problem, self.limits
        parts = max(MOST_PARTS, 4 * len(problem.units))
        if problem.n < 2 * parts or problem.n * len(problem.units) > COARSE_SIZE:
            return []
        coarse, cluster = merge_segments(problem, narrow_order(problem), parts)
        until = time.perf_counter() + COARSE_SHARE * limits.left_s
        try:
            found = search(coarse, replace(limits, deadline=until, prove=False, rounds=8, report=None)).assignment
        except Infeasible:
            return []
        return [cost_of(problem, found.position[cluster], found.sequence, overlap=limits.overlap)]

    def _path_starts(self) -> list[Assignment]:
        """Slicings for promising sequences of few units, where there are too many units to consider them all."""
        problem, limits = self.problem, self.limits
        if not self.by_sequence or limits.stages is not None:
            return []
        order, until = narrow_order(problem), time.perf_counter() + PATH_SHARE * limits.left_s
        found: list[Assignment] = []
        for seconds, path in promising_paths(problem):
            if time.perf_counter() > until:
                break
            slicer = Slicer(problem, by_sequence(problem, path.tolist()), overlap=limits.overlap)
            best = min((a.cost_s for a in found), default=None)
            slicing = slicer.slice(order, best, guess_s=1.3 * seconds, deadline=until)
            if slicing is not None:
                found.append(self._assignment(slicing, order))
        return found

    def _starts(self, coarse: list[Assignment]) -> list[Assignment]:
        """`coarse` and slicings of a few orders, the best first."""
        backwards: np.ndarray = -np.arange(self.problem.n, dtype=float)
        orders = [natural_order(self.problem), first_order(self.problem), order_by(self.problem, backwards)]
        found = list(coarse)
        tries = 0
        quick = self.limits.deadline - 0.85 * self.limits.left_s
        while tries < (8 if found else 200) and time.perf_counter() < (quick if found else self.limits.deadline):
            order = orders.pop(0) if orders else random_order(self.problem, self.rng)
            tries += 1
            slicing = self.slicer.slice(order, deadline=quick if found else self.limits.deadline)
            if slicing is not None:
                found.append(self._assignment(slicing, order))
        return sorted(found, key=lambda a: a.cost_s)

    def _improve(self, start: Assignment, times: int) -> Assignment:
        """Anneals and re-slices; keeps the best."""
        current = start
        for _ in range(times):
            if self.limits.left_s <= 0:
                break
            moved = self._anneal(current, max(min(STEPS, 4000 * self.problem.n), 100 * self.problem.n))
            if moved.cost_s <= current.cost_s:
                current = moved
            self.iteration += 1
            if self.slow and self.iteration % 8:
                continue
            order = order_by(self.problem, self.rng.random(self.problem.n), current.position)
            slicing = self.slicer.slice(order, current.cost_s * (1 - TOLERANCE), deadline=self.limits.deadline)
            if slicing is not None:
                sliced = self._assignment(slicing, order)
                if sliced.cost_s < current.cost_s:
                    current = sliced
        if self.best is None or current.cost_s < self.best.cost_s * (1 - TOLERANCE):
            self.best = current
            self._report("moves")
        return current

    def _scatter(self, starts: int) -> None:
        """Short searches from random orders cut evenly for units in random order; the best three go on.

        Unequal units and links make many valleys, which no order's slicing tells apart.
        """
        problem, m = self.problem, self.limits.stages or len(self.problem.units)
        found: list[Assignment] = []
        for _ in range(starts):
            if self.limits.left_s <= 0 or m > problem.n:
                break
            order = random_order(problem, self.rng)
            sequence = self.rng.permutation(len(problem.units))[:m]
            position: np.ndarray = np.empty(problem.n, dtype=np.int64)
            used = int(self.rng.integers(1, m + 1)) if self.limits.stages is None else m
            for s, part in enumerate(np.array_split(order, used)):
                position[part] = s
            now = totals(problem, position, sequence, overlap=self.limits.overlap)
            fits = (now.memory_bytes <= problem.capacity_bytes[sequence] * (1 + 1e-9)).all()
            if fits and np.isfinite(now.cost_s).all():
                start = Assignment(position, sequence, float(now.cost_s.max()))
                found.append(self._anneal(start, 100 * problem.n, hot=1.0))
        for start in sorted(found, key=lambda a: a.cost_s)[:3]:
            self._improve(start, 5)

    def _anneal(self, start: Assignment, steps: int, hot: float = 0.3) -> Assignment:
        return anneal(
            self.problem, start, steps=steps, seed=int(self.rng.integers(2**31)), overlap=self.limits.overlap,
            keep=self.limits.stages is not None, swap=self.swap, hot=hot,
        )  # fmt: skip

    def _rounds(self, rounds: int) -> None:
        """Alternates between the best plan and fresh orders."""
        assert self.best is not None
        for r in range(rounds):
            if self.limits.left_s <= 0:
                return
            if r % 2 and self.scatter:
                self._scatter(SCATTERED // 2)
            elif r % 4 == 3:
                order = random_order(self.problem, self.rng)
                slicing = self.slicer.slice(order, deadline=self.limits.deadline)
                if slicing is not None:
                    self._improve(self._assignment(slicing, order), 10)
            else:
                self._improve(self.best, 5)

    def _prove(self, effort: float, *, moves: bool = True) -> bool:
        """Asks for anything better, by a hundredth, a thousandth, at all; whether there is nothing.

        Each "no" is a lower bound.  It ends when CP-SAT leaves a question open, or the time is over; `effort` is
        CP-SAT's deterministic time for all questions together.  Without `moves`, nothing but CP-SAT is used: a first
        run needn't wait for their compilation.
        """
        assert self.best is not None
        step, fine = 0, False
        positions = min(len(self.problem.units), self.problem.n)
        building_s = self.problem.n * positions * len(unit_classes(self.problem)) / TERMS_PER_S
        while self.limits.left_s > building_s and effort > 0:
            target = self.best.cost_s * (1 - MARGINS[step])
            if target <= self.bound_s:
                step += 1
                if step == len(MARGINS) or self.best.cost_s == 0:
                    break
                continue
            answer = find_below(
                self.problem, target, stages=self.limits.stages, overlap=self.limits.overlap,
                seconds=self.limits.left_s, effort=effort, seed=self.limits.seed, fine=fine,
            )  # fmt: skip
            effort -= answer.effort
            if answer.exists is False:
                self.bound_s, self.bound_by = target, BY_CP_SAT
                if MARGINS[step] <= PROVED_WITHIN:
                    break
                continue
            if answer.position is None or answer.unit_of is None:
                break
            better = self._from_units(answer.position, answer.unit_of)
            if better.cost_s < self.best.cost_s * (1 - TOLERANCE):
                self.best = better
                self._report("proof")
                self._improve(better, 3 if moves else 0)
                step = 0
            elif not fine:  # better only by rounding to ticks
                fine = True
            else:  # a tie in fine ticks too
                break
        return self._found().proved

    def _all_orders(self) -> bool:
        """Slices every order at once, where there are few; whether the best plan is proved."""
        assert self.best is not None
        below = self.best.cost_s * (1 - MARGINS[-1])
        if self.limits.left_s <= 0:
            return False
        answer = slice_all_orders(
            self.problem, below, stages=self.limits.stages, overlap=self.limits.overlap, seconds=self.limits.left_s
        )
        if answer is None:
            return False
        if answer.bound_s > self.bound_s:
            self.bound_s, self.bound_by = answer.bound_s, "dynamic program over all orders: no plan is below it"
        if answer.position is not None and answer.unit_of is not None:
            better = self._from_units(answer.position, answer.unit_of)
            if better.cost_s < self.best.cost_s * (1 - TOLERANCE):
                self.best = better
                self._report("all orders")
        return self._found().proved

    def _from_units(self, position: np.ndarray, unit_of: np.ndarray) -> Assignment:
        order = order_by(self.problem, np.arange(self.problem.n, dtype=float), position)
        return self._assignment(Slicing(np.inf, unit_of), order)

    def _last_resort(self) -> Found:
        """No order could be sliced: asks CP-SAT whether any plan fits at all."""
        problem = self.problem
        if problem.n * len(problem.units) <= NO_BOUND and self.limits.left_s > 0:
            answer = find_below(
                problem, max(self.slicer.ceiling_s, 1e-9), stages=self.limits.stages, overlap=self.limits.overlap,
                seconds=self.limits.left_s, seed=self.limits.seed,
            )  # fmt: skip
            if answer.exists is False:
                raise Infeasible(_no_plan(problem, self.limits.stages, proved=True))
            if answer.exists and answer.position is not None and answer.unit_of is not None:
                self.best = self._from_units(answer.position, answer.unit_of)
                self._improve(self.best, 5)
                self._prove(np.inf)
                return self._found()
        raise Infeasible(_no_plan(problem, self.limits.stages, proved=False))


def _no_plan(problem: Problem, stages: int | None, *, proved: bool) -> str:
    how = f"{stages} stages" if stages else f"up to {len(problem.units)} stages"
    what = "no cut" if proved else "no cut that was found"
    return (
        f"memory: {what} of the graph into {how} fits the devices (it needs {problem.memory_bytes.sum():.0f} bytes in "
        f"all, the largest indivisible part {problem.memory_bytes.max():.0f}; the devices have "
        f"{problem.capacity_bytes.sum():.0f} in all, {problem.capacity_bytes.max():.0f} at most each)"
    )
