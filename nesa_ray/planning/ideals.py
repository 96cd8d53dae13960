# mypy: disable-error-code="var-annotated,no-untyped-def,assignment"
"""Every topological order at once, where a graph has few *ideals*: sets of items closed under precedence.

A stage leads from one ideal to a larger one, so the dynamic program of `slicing`, over ideals instead of the places of
one order, looks at every acyclic partition (Tarnawski et al., NeurIPS 2020, arXiv 2006.16423).  With one kind of link
its answer is the optimum.  With unequal links, a tensor whose other end is certainly in the neighbouring stage has its
exact price, any other the cheapest it could have: the answer is a lower bound, and its path mostly a good plan.  With
many classes of units, similar ones are rounded up to the best of both, which is a lower bound too.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from nesa_ray.planning.choices import EARLIER, LAST, LATER, NEXT, by_class, states_by_class, unit_classes
from nesa_ray.planning.compiled import compiled
from nesa_ray.planning.problem import Problem, grouped
from nesa_ray.planning.slicing import ROLES, SEGMENTS_PER_S, Slicer

MOST_IDEALS = 20_000
MOST_MEMBERS = 100_000_000  # ideals × items
MOST_PAIRS = 4_000_000
WORK = 400_000_000  # pairs × transitions, a second or two


@dataclass(frozen=True, eq=False)
class AllOrders:
    """No plan's bottleneck is below `bound_s`.  `unit_of` and `position`: the plan found with it, None without."""

    bound_s: float
    unit_of: np.ndarray | None = None
    position: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class _Lattice:
    """Ideals, smaller ones first, and what one more item makes of each.

    member    [N, n] 1 for the items of each
    after     (pointer, [(item, ideal)]) by ideal
    newest    [N] the only maximal item, -1 if there are more: the stage before certainly made it
    following [N] the only item that can come next, -1 if there are more: the stage after certainly has it
    """

    member: np.ndarray
    after: tuple[np.ndarray, np.ndarray]
    newest: np.ndarray
    following: np.ndarray


def slice_all_orders(
    problem: Problem, below_s: float, *, stages: int | None = None, overlap: bool = False, seconds: float = np.inf
) -> AllOrders | None:
    """The best bottleneck below `below_s` over all orders, or that there is none; None where that is too much work.

    Too much is what isn't likely to end within `seconds`, too.
    """
    lattice = _lattice(problem)
    if lattice is None:
        return None
    size = len(lattice.member)
    fastest = _sums(*lattice.after, problem.time_s.min(axis=0)[None])[0]
    offset = _count_pairs(lattice.after[0], lattice.after[1], fastest, below_s, MOST_PAIRS)
    pairs = int(offset[size])
    if pairs > MOST_PAIRS:
        return None
    relaxed = _rounded_up(problem, WORK // max(pairs, 1))
    if relaxed is None or (stages or 0) > len(problem.units):
        return None
    if states_by_class(relaxed) * len(unit_classes(relaxed)) * pairs > seconds * SEGMENTS_PER_S:
        return None
    slicer = Slicer(relaxed, by_class(relaxed, stages), overlap=overlap, roles=range(ROLES))
    to, parts = _pairs(
        offset, *lattice.after, lattice.member, lattice.newest, lattice.following, fastest, below_s, relaxed.producer,
        *relaxed.pins, *relaxed.outputs, *relaxed.inputs, slicer.values, slicer.rows,
    )  # fmt: skip
    finite = np.where(np.isfinite(relaxed.time_s), relaxed.time_s, 0.0)
    found = slicer.best_path(
        offset, to, parts, _sums(*lattice.after, finite), _sums(*lattice.after, np.isinf(relaxed.time_s).astype(float)),
        _sums(*lattice.after, problem.memory_bytes[None])[0], below_s,
    )  # fmt: skip
    if found is None:
        return AllOrders(below_s)
    cost, steps = found
    unit_of, position = np.zeros((2, problem.n), dtype=np.int64)
    for s, (unit, h, i) in enumerate(steps):
        mine = (lattice.member[i] - lattice.member[h]) > 0
        unit_of[mine], position[mine] = unit, s
    if relaxed is not problem and not _allowed(problem, unit_of):
        return AllOrders(cost)
    return AllOrders(cost, unit_of, position)


def _allowed(problem: Problem, unit_of: np.ndarray) -> bool:
    """Memory fits and every item can run where it is."""
    held = np.bincount(unit_of, weights=problem.memory_bytes, minlength=len(problem.units))
    runs = all(np.isfinite(problem.unit_time_s(u)[:, unit_of == u]).all() for u in np.unique(unit_of))
    return runs and bool((held <= problem.capacity_bytes * (1 + 1e-9)).all())


def _lattice(problem: Problem) -> _Lattice | None:
    """None where there are too many ideals."""
    n = problem.n
    after = _rows(problem.after)
    before = [sum(1 << u for u in row) for row in _rows(problem.before)]
    most = min(MOST_IDEALS, MOST_MEMBERS // n)
    index = {0: 0}
    ready = [[v for v in range(n) if not before[v]]]
    ideals = [0]
    steps: list[tuple[int, int, int]] = []
    for at, ideal in itertools.takewhile(lambda _: len(ideals) <= most, _growing(ideals)):
        for v in ready[at]:
            larger = ideal | 1 << v
            known = index.get(larger)
            if known is None:
                known = index[larger] = len(ideals)
                ideals.append(larger)
                new = [w for w in after[v] if before[w] & larger == before[w]]
                ready.append([w for w in ready[at] if w != v] + new)
            steps.append((at, v, known))
    if len(ideals) > most:
        return None
    width = (n + 7) // 8
    bits = np.frombuffer(b"".join(i.to_bytes(width, "little") for i in ideals), dtype=np.uint8).reshape(-1, width)
    member = np.unpackbits(bits, axis=1, bitorder="little", count=n)
    table = np.array(steps, dtype=np.int64).reshape(-1, 3)
    pointer = grouped(len(ideals), [(a, 0) for a, _, _ in steps])[0]
    newest, following = np.full((2, len(ideals)), -1)
    arrives = np.bincount(table[:, 2], minlength=len(ideals))
    only = arrives[table[:, 2]] == 1
    newest[table[only, 2]] = table[only, 1]
    only = np.diff(pointer)[table[:, 0]] == 1
    following[table[only, 0]] = table[only, 1]
    return _Lattice(member, (pointer, np.ascontiguousarray(table[:, 1:])), newest, following)


def _growing(values: list[int]):
    """(index, value) of a list that grows meanwhile."""
    at = 0
    while at < len(values):
        yield at, values[at]
        at += 1


def _rows(table: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    pointer, values = table
    return [values[a:b].tolist() for a, b in itertools.pairwise(pointer)]


def _rounded_up(problem: Problem, most_transitions: int) -> Problem | None:
    """The problem with so few classes of units that the automaton is small; None where even one is too many."""
    while True:
        classes = unit_classes(problem)
        places = 1 if problem.one_link else len(problem.latency_s) + 1
        if states_by_class(problem) * len(classes) * places <= most_transitions:
            return problem
        if len(classes) == 1:
            return None
        features = [_features(problem, units[0]) for units in classes]
        a, b = min(
            itertools.combinations(range(len(classes)), 2),
            key=lambda p: float(abs(features[p[0]] - features[p[1]]).sum()),
        )
        problem = _merged(problem, np.array([*classes[a], *classes[b]]))


def _features(problem: Problem, unit: int) -> np.ndarray:
    """What makes units alike: speed, memory, and the links of their place."""
    times = problem.unit_time_s(unit).max(axis=0)
    speed = np.log(max(float(times[np.isfinite(times)].sum()), 1e-30))
    room = np.log(max(min(float(problem.capacity_bytes[unit]), float(problem.memory_bytes.sum())), 1.0))
    wires = np.log(np.maximum(problem.s_per_byte[problem.place[unit]], 1e-30)) / len(problem.s_per_byte)
    return np.array([speed, room, 10.0 * np.isinf(times).sum(), *wires])


def _merged(problem: Problem, units: np.ndarray) -> Problem:
    """Those units as good as the best of them in everything, and so interchangeable."""
    pointer, types = problem.unit_types
    each = [types[a:b].tolist() for a, b in itertools.pairwise(pointer)]
    best = len(problem.time_s)
    used = sorted({t for u in units for t in each[u]})
    for u in units:
        each[u] = [best]
    capacity, free, place = problem.capacity_bytes.copy(), problem.free.copy(), problem.place.copy()
    capacity[units], free[units] = capacity[units].max(), free[units].any()
    joined = np.unique(place[units])
    place[units] = len(problem.latency_s)
    names, place = np.unique(place, return_inverse=True)

    def links(table: np.ndarray) -> np.ndarray:
        row = table[joined].min(axis=0)
        wide = np.block([[table, row[:, None]], [row[None, :], np.full((1, 1), row[joined].min())]])
        return wide[np.ix_(names, names)]

    return replace(
        problem,
        time_s=np.concatenate([problem.time_s, problem.time_s[used].min(axis=0)[None]]),
        unit_types=grouped(len(each), [(u, t) for u, row in enumerate(each) for t in row]),
        capacity_bytes=capacity, free=free, place=place, latency_s=links(problem.latency_s),
        s_per_byte=links(problem.s_per_byte),
    )  # fmt: skip


@compiled
def _sums(pointer, after, values):
    """[K, N] the sum of values [K, n] over the items of each ideal."""
    total = np.zeros((len(values), len(pointer) - 1))
    for h in range(len(pointer) - 1):
        for x in range(pointer[h], pointer[h + 1]):
            for k in range(len(values)):
                total[k, after[x, 1]] = total[k, h] + values[k, after[x, 0]]
    return total


@compiled
def _count_pairs(pointer, after, fastest, limit_s, most):
    """[N + 1] where the pairs (ideal, larger one within the limit) that start at each ideal begin."""
    size = len(fastest)
    offset = np.zeros(size + 1, np.int64)
    stamp = np.full(size, -1, np.int64)
    queue = np.empty(size, np.int64)
    for h in range(size):
        queue[0] = h
        count, done = 1, 0
        while done < count:
            p = queue[done]
            done += 1
            for x in range(pointer[p], pointer[p + 1]):
                i = after[x, 1]
                if stamp[i] != h and fastest[i] - fastest[h] < limit_s:
                    stamp[i] = h
                    queue[count] = i
                    count += 1
        offset[h + 1] = offset[h] + count - 1
        if offset[h + 1] > most:
            offset[size] = offset[h + 1]
            break
    return offset


@compiled
def _pairs(
    offset, pointer, after, member, newest, following, fastest, limit_s, producer, pin_ptr, pins, out_ptr, outs, in_ptr,
    ins, values, rows,
):  # fmt: skip
    """(larger ideal [pairs], communication [rows * columns, pairs]) of the pairs that `_count_pairs` counted."""
    size, columns = len(fastest), values.shape[1]
    height = 1
    for r in rows:
        height = max(height, r + 1)
    to = np.empty(offset[size], np.int64)
    parts = np.empty((height * columns, offset[size]))
    stamp = np.full(size, -1, np.int64)
    queue = np.empty(size, np.int64)
    total = np.zeros((size, height * columns))
    for h in range(size):
        queue[0] = h
        total[h, :] = 0.0
        count, done = 1, 0
        while done < count:
            p = queue[done]
            done += 1
            for x in range(pointer[p], pointer[p + 1]):
                v, i = after[x, 0], after[x, 1]
                if stamp[i] == h or fastest[i] - fastest[h] >= limit_s:
                    continue
                stamp[i] = h
                queue[count] = i
                at = offset[h] + count - 1
                to[at] = i
                count += 1
                total[i, :] = total[p, :]
                for side in range(2):
                    first, last = (in_ptr[v], in_ptr[v + 1]) if side else (out_ptr[v], out_ptr[v + 1])
                    for y in range(first, last):
                        t = ins[y] if side else outs[y]
                        for new in range(2):
                            role = _role(t, h, i if new else p, member, newest[h], -1, producer, pin_ptr, pins)
                            if role >= 0:
                                row = rows[role]
                                for c in range(columns):
                                    total[i, row * columns + c] += values[t, c] if new else -values[t, c]
                for r in range(parts.shape[0]):
                    parts[r, at] = total[i, r]
                w = following[i]
                for side in range(2 if w >= 0 else 0):
                    first, last = (in_ptr[w], in_ptr[w + 1]) if side else (out_ptr[w], out_ptr[w + 1])
                    for y in range(first, last):
                        t = ins[y] if side else outs[y]
                        for new in range(2):
                            role = _role(t, h, i, member, newest[h], w if new else -1, producer, pin_ptr, pins)
                            if role >= 0:
                                row = rows[role]
                                for c in range(columns):
                                    parts[row * columns + c, at] += values[t, c] if new else -values[t, c]
    return to, parts


@compiled
def _role(t, h, i, member, newest, following, producer, pin_ptr, pins):
    """Where a tensor comes from or goes to, seen from the stage that leads from ideal h to ideal i; -1: neither.

    `newest` is certainly in the stage before, `following` in the one after (-1: nothing is).
    """
    p = producer[t]
    inside = member[i, p] and not member[h, p]
    reads, earlier, later, last, following_reads = False, False, False, False, False
    for c in range(pin_ptr[t], pin_ptr[t + 1]):
        w = pins[c]
        if member[h, w]:
            earlier = True
            last = last or w == newest
        elif member[i, w]:
            reads = True
        else:
            later = True
            following_reads = following_reads or w == following
    if not inside:
        if not reads:
            return -1
        if member[h, p]:
            return LAST if p == newest else EARLIER
        return NEXT if p == following else LATER
    if not earlier and not later:
        return -1
    before = (1 if last else 2) if earlier else 0
    after = (1 if following_reads else 2) if later else 0
    return 4 + 3 * before + after
