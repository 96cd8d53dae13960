"""Schedules as data: for each rank, the list of Actions that it executes in one step.

An Action prints as in torch.distributed.pipelining: `0F2` is stage 0's forward of micro-batch 2, `0B2` its backward.
GPipe: Huang et al., arXiv 1811.06965.  1F1B: PipeDream-flush, Narayanan et al., arXiv 2006.09503; interleaved: arXiv
2104.04473.  Zero bubble (a backward split in `I`, the gradients of the stage's inputs, which others wait for, and `W`,
those of its weights, which nobody does): Qi et al., arXiv 2401.10241.
A rank executes its list in order but for `W`, which only fill the time that it would wait otherwise (`RankQueue`).
Stages form a DAG; what a chain's position is to the classical schedules, the longest distance to a sink is here.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import nearest
from nesa_ray.planning.plan import topological_stages


class ActionKind(Enum):
    """What is done with a micro-batch."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_BACKWARD = "I"
    WEIGHT_BACKWARD = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One stage's forward or backward of one micro-batch."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


StageGraph = Mapping[int, set[int]]
RankOf = Mapping[int, int]  # the rank that runs each stage


@dataclass(frozen=True)
class Schedule:
    """Each rank's actions in order.  A rank is an actor; it has its stage's number, or runs several stages.

    room  how many micro-batches' activations a stage may keep, where that is more than its list keeps
    """

    name: str
    microbatches: int
    ranks: Mapping[int, tuple[Action, ...]]
    room: Mapping[int, int] = field(default_factory=dict)

    @property
    def training(self) -> bool:
        """Whether it has backwards."""
        return any(a.kind is not ActionKind.FORWARD for actions in self.ranks.values() for a in actions)

    def queue(self, rank: int) -> RankQueue:
        """What the rank does next, from the beginning of a step."""
        return RankQueue(self.ranks[rank], self.room)

    def __str__(self) -> str:
        return "\n".join(f"rank {r}: {' '.join(map(str, actions))}" for r, actions in self.ranks.items())


class RankQueue:
    """What a rank does next, of its list of one step.

    All but weight gradients in the list's order.  Those, in order among themselves, are for when what is next hasn't
    arrived yet, so whatever computing and messages really take, no one waits for them; and for when the stage keeps as
    many micro-batches as it has room for.  Sums don't depend on when that is.

    room  see Schedule
    """

    def __init__(self, actions: Sequence[Action], room: Mapping[int, int]) -> None:
        self._heads = deque(a for a in actions if a.kind is not ActionKind.WEIGHT_BACKWARD)
        self._fillers = deque(a for a in actions if a.kind is ActionKind.WEIGHT_BACKWARD)
        self._split: set[tuple[int, int]] = set()
        self._live: Counter[int] = Counter()
        self._most = Counter(room)
        for a in actions:
            self._live[a.stage] += _KEPT[a.kind]
            self._most[a.stage] = max(self._most[a.stage], self._live[a.stage])
        self._live.clear()

    def next(self, arrived: Callable[[Action], bool]) -> Action | None:
        """The action to execute now, even if it has to wait; None after the last.  `done` has to be told of it.

        arrived  whether all that an action receives is there
        """
        head = self._heads[0] if self._heads else None
        filler = self._fillers[0] if self._fillers else None
        if filler is None or (filler.stage, filler.microbatch) not in self._split:
            return head
        if head is None or (head.kind is ActionKind.FORWARD and self._live[head.stage] >= self._most[head.stage]):
            return filler
        return head if arrived(head) else filler

    def done(self, action: Action) -> None:
        """The action has been executed."""
        (self._fillers if action.kind is ActionKind.WEIGHT_BACKWARD else self._heads).popleft()
        self._live[action.stage] += _KEPT[action.kind]
        if action.kind is ActionKind.INPUT_BACKWARD:
            self._split.add((action.stage, action.microbatch))


# By how much an action changes the number of micro-batches whose activations are kept.
_KEPT = {
    ActionKind.FORWARD: 1, ActionKind.BACKWARD: -1, ActionKind.INPUT_BACKWARD: 0, ActionKind.WEIGHT_BACKWARD: -1,
}  # fmt: skip


def distance_to_sink(stages: StageGraph) -> dict[int, int]:
    """Longest number of stages between each stage and the end; raises InvalidConfig on a cycle."""
    order = topological_stages({s: set(to) for s, to in stages.items()})
    if order is None:
        raise InvalidConfig("schedule: the stage graph has a cycle")
    distance: dict[int, int] = {}
    for s in reversed(order):
        distance[s] = max((distance[t] + 1 for t in stages[s]), default=0)
    return distance


def forward_only(stages: StageGraph, microbatches: int, rank_of: RankOf | None = None) -> Schedule:
    """Inference: every stage forwards every micro-batch; a rank of several takes as many at a time as there are ranks.

    Without `rank_of` each stage has its own rank.
    """
    rank_of = rank_of or {s: s for s in stages}
    distance, together = distance_to_sink(stages), len(set(rank_of.values()))
    ranks: dict[int, list[Action]] = {rank_of[s]: [] for s in stages}
    for s in stages:
        ranks[rank_of[s]] += _forwards(s, range(microbatches))
    for actions in ranks.values():
        actions.sort(key=lambda a: (a.microbatch // together, -distance[a.stage], a.microbatch))
    return Schedule("forward_only", microbatches, {r: tuple(actions) for r, actions in ranks.items()})


def gpipe(stages: StageGraph, microbatches: int) -> Schedule:
    """All forwards, then all backwards: keeps every micro-batch's activations."""
    ranks = {s: (*_forwards(s, range(microbatches)), *_backwards(s, range(microbatches))) for s in stages}
    return Schedule("gpipe", microbatches, ranks)


def one_f_one_b(stages: StageGraph, microbatches: int, *, ahead: Mapping[int, int] | None = None) -> Schedule:
    """1F1B: a stage d stages before the end starts with d forwards, then alternates: keeps d + 1 activations.

    With so many more forwards `ahead` as slow links need (micro_batches_ahead): those that are on their way meanwhile.
    """
    ranks = {}
    for s, distance in distance_to_sink(stages).items():
        warm = min(distance + (ahead or {}).get(s, 0), microbatches)
        actions = [*_forwards(s, range(warm))]
        for m in range(microbatches - warm):
            actions += [Action(s, ActionKind.FORWARD, warm + m), Action(s, ActionKind.BACKWARD, m)]
        actions += _backwards(s, range(microbatches - warm, microbatches))
        ranks[s] = tuple(actions)
    return Schedule("1f1b", microbatches, {s: ranks[s] for s in stages})


def zero_bubble(
    stages: StageGraph,
    microbatches: int,
    times: Mapping[int, StageTimes] | None = None,
    *,
    ahead: Mapping[int, int] | None = None,
    transfers: Transfers | None = None,
) -> Schedule:
    """ZB-H1: 1F1B's memory, its bubbles filled with weight gradients.

    The order comes from simulating the ranks with the stages' times (all equal without them) and transfers (none).
    """
    most = max(distance_to_sink(stages).values()) + 1 + max((ahead or {0: 0}).values())
    limits = dict.fromkeys(stages, most)
    own = {s: s for s in stages}
    ranks = list_schedule(stages, own, microbatches, times, limits, split_backward=True, transfers=transfers)
    return Schedule("zero_bubble", microbatches, ranks, dict.fromkeys(stages, min(most, microbatches)))


def interleaved(
    stages: StageGraph,
    microbatches: int,
    times: Mapping[int, StageTimes] | None = None,
    *,
    rank_of: RankOf | None = None,
) -> Schedule:
    """Interleaved 1F1B: each rank runs several stages, so the pipeline fills in smaller pieces.

    `rank_of` says which rank runs each stage; by default each runs its own, which is 1F1B by simulation.
    """
    rank_of = rank_of or {s: s for s in stages}
    distance = distance_to_sink(stages)
    limits: dict[int, int] = {}
    for s, rank in rank_of.items():
        limits[rank] = max(limits.get(rank, 0), distance[s] + list(rank_of.values()).count(rank))
    ranks = list_schedule(stages, rank_of, microbatches, times, limits, split_backward=False)
    return Schedule("interleaved", microbatches, ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one micro-batch on a stage: forward, gradients of inputs, gradients of weights."""

    forward_s: float = 1.0
    input_backward_s: float = 1.0
    weight_backward_s: float = 1.0

    def of(self, kind: ActionKind) -> float:
        """Seconds of one action."""
        if kind is ActionKind.FORWARD:
            return self.forward_s
        if kind is ActionKind.INPUT_BACKWARD:
            return self.input_backward_s
        if kind is ActionKind.WEIGHT_BACKWARD:
            return self.weight_backward_s
        return self.input_backward_s + self.weight_backward_s

    def slower(self, factor: float) -> StageTimes:
        """The same stage taking so many times as long."""
        return StageTimes(
            forward_s=factor * self.forward_s,
            input_backward_s=factor * self.input_backward_s,
            weight_backward_s=factor * self.weight_backward_s,
        )


@dataclass(frozen=True, slots=True)
class Transfer:
    """What goes from one stage to another per micro-batch: seconds on the wire, and seconds until it arrives."""

    wire_s: float = 0.0
    latency_s: float = 0.0


Transfers = Mapping[tuple[int, int], Transfer]  # by (producer, consumer); gradients take the same, the other way


def micro_batches_ahead(stages: StageGraph, times: Mapping[int, StageTimes], transfers: Transfers) -> dict[int, int]:
    """How many more micro-batches each stage has to begin for links to be full: the bandwidth-delay product.

    As many as fit, at the pace of the slowest stage or wire, into the time that messages are on their way from the
    stage to the end and back.
    """
    wires = [t.wire_s for t in transfers.values()]
    pace_s = max([*wires, *(t.of(ActionKind.FORWARD) + t.of(ActionKind.BACKWARD) for t in times.values())])
    away: dict[int, float] = {}
    for s in sorted(stages, key=distance_to_sink(stages).__getitem__):
        hops = {to: transfers.get((s, to), Transfer()) for to in stages[s]}
        away[s] = max((2 * (hop.wire_s + hop.latency_s) + away[to] for to, hop in hops.items()), default=0.0)
    return {s: math.ceil(seconds / pace_s - 1e-9) if pace_s else 0 for s, seconds in away.items()}


def list_schedule(
    stages: StageGraph,
    rank_of: RankOf,
    microbatches: int,
    times: Mapping[int, StageTimes] | None,
    live_limits: Mapping[int, int],
    *,
    split_backward: bool,
    transfers: Transfers | None = None,
) -> dict[int, tuple[Action, ...]]:
    """Each rank always takes the action that can start first; the shortest step over several ways to break ties.

    `live_limits` bounds the micro-batches whose activations a rank keeps (until their last backward); it grows where
    a stage graph can't run within it.
    """
    times = times or {s: StageTimes() for s in stages}
    backward = ActionKind.INPUT_BACKWARD if split_backward else ActionKind.BACKWARD
    kinds = [backward, ActionKind.FORWARD, *([ActionKind.WEIGHT_BACKWARD] if split_backward else [])]
    limits = dict(live_limits)
    together = len(set(rank_of.values()))
    # Nobody waits for weight gradients, so they are no rank's first choice.
    preferences = [p for p in itertools.permutations(kinds) if p[0] is not ActionKind.WEIGHT_BACKWARD]
    breadths = sorted({1, together, microbatches}) if together < len(stages) else [1]  # of ranks with several stages
    while True:
        tried = [
            _try_list_schedule(stages, rank_of, microbatches, times, limits, preference, breadth, transfers or {})
            for preference in preferences
            for breadth in breadths
        ]
        found = [t for t in tried if t is not None]
        if found:
            return min(found, key=lambda t: t[0])[1]
        limits = {r: n + 1 for r, n in limits.items()}


def _try_list_schedule(
    stages: StageGraph,
    rank_of: RankOf,
    microbatches: int,
    times: Mapping[int, StageTimes],
    limits: Mapping[int, int],
    kinds: Sequence[ActionKind],
    breadth: int,
    transfers: Transfers,
) -> tuple[float, dict[int, tuple[Action, ...]]] | None:
    """The step's length and the lists; `kinds` by preference, `breadth` micro-batches go through together."""
    split_backward = ActionKind.WEIGHT_BACKWARD in kinds
    backward = ActionKind.INPUT_BACKWARD if split_backward else ActionKind.BACKWARD
    last = ActionKind.WEIGHT_BACKWARD if split_backward else backward
    producers = _producers(stages)
    depth = {s: -d for s, d in distance_to_sink(stages).items()}
    end: dict[Action, float] = {}
    arrival: dict[tuple[Action, int], float] = {}  # of what an action made, at another stage
    wire_free: dict[tuple[int, int], float] = {}
    free = dict.fromkeys(rank_of.values(), 0.0)
    live = dict.fromkeys(free, 0)
    lists: dict[int, list[Action]] = {r: [] for r in sorted(free)}
    following = {(s, k): 0 for s in stages for k in (ActionKind.FORWARD, backward, ActionKind.WEIGHT_BACKWARD)}
    total = len(stages) * microbatches * (3 if split_backward else 2)

    def start(s: int, kind: ActionKind) -> float | None:
        m, rank = following[s, kind], rank_of[s]
        if m == microbatches:
            return None
        if kind is ActionKind.FORWARD:
            if live[rank] >= limits[rank]:
                return None
            before = [Action(p, ActionKind.FORWARD, m) for p in producers[s]]
        elif kind is backward:
            before = [Action(s, ActionKind.FORWARD, m), *(Action(c, backward, m) for c in stages[s])]
        else:
            before = [Action(s, backward, m)]
        if any(b not in end for b in before):
            return None
        return max([free[rank], *(arrival.get((b, s), end[b]) for b in before)])

    def send(made: Action, to: int, transfer: Transfer | None) -> None:
        if transfer is not None and rank_of[made.stage] != rank_of[to]:
            way = made.stage, to
            wire_free[way] = max(end[made], wire_free.get(way, 0.0)) + transfer.wire_s
            arrival[made, to] = wire_free[way] + transfer.latency_s

    while len(end) < total:
        best: tuple[float, int, int, int, int, ActionKind] | None = None
        for s in stages:
            for preference, kind in enumerate(kinds):
                at = start(s, kind)
                if at is not None:
                    group = following[s, kind] // breadth
                    deeper = -depth[s] if kind is backward else depth[s]
                    choice = (at, preference, group, deeper, s, kind)
                    if best is None or choice[:5] < best[:5]:
                        best = choice
        if best is None:
            return None
        at, _, _, _, s, kind = best
        action, rank = Action(s, kind, following[s, kind]), rank_of[s]
        following[s, kind] += 1
        end[action] = free[rank] = at + times[s].of(kind)
        lists[rank].append(action)
        if kind is ActionKind.FORWARD:
            for to in stages[s]:
                send(action, to, transfers.get((s, to)))
        elif kind is backward:
            for to in producers[s]:
                send(action, to, transfers.get((to, s)))
        live[rank] += {ActionKind.FORWARD: 1, last: -1}.get(kind, 0)
    return max(end.values()), {r: tuple(actions) for r, actions in lists.items()}


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}


def make_schedule(
    name: str,
    stages: StageGraph,
    microbatches: int,
    times: Mapping[int, StageTimes] | None = None,
    *,
    rank_of: RankOf | None = None,
) -> Schedule:
    """The training schedule of that name; raises InvalidConfig when there is none, or no micro-batch.

    `times` shape the orders that are found by simulation (interleaved, zero_bubble).  Ranks that run several stages,
    by `rank_of`, need interleaved.
    """
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise InvalidConfig(f"schedule: needs one of {known}, got {name!r}{nearest(name, SCHEDULES)}")
    if microbatches < 1:
        raise InvalidConfig(f"microbatches: needs at least 1, got {microbatches}")
    if name == "interleaved":
        return interleaved(stages, microbatches, times, rank_of=rank_of)
    if rank_of is not None and len(set(rank_of.values())) < len(stages):
        raise InvalidConfig(f"schedule: several stages on a rank need interleaved, got {name!r}")
    if name == "zero_bubble":
        return zero_bubble(stages, microbatches, times)
    return SCHEDULES[name](stages, microbatches)


def dry_run(schedule: Schedule, stages: StageGraph) -> dict[int, int]:
    """Executes the schedule without computing; returns each stage's peak number of live micro-batches, or its room.

    Raises InvalidConfig, naming the first action of each rank that can't start, if the schedule deadlocks, and if a
    stage doesn't forward (and, in training, backward) each micro-batch exactly once.
    """
    live: Counter[int] = Counter()
    peak = {s: schedule.room.get(s, 0) for s in stages}
    done: Counter[Action] = Counter()
    for a in linearise(schedule, stages):
        done[a] += 1
        live[a.stage] += _KEPT[a.kind]
        peak[a.stage] = max(peak[a.stage], live[a.stage])
    for s in stages:
        for m in range(schedule.microbatches):
            whole = done[Action(s, ActionKind.BACKWARD, m)]
            halves = [done[Action(s, k, m)] for k in (ActionKind.INPUT_BACKWARD, ActionKind.WEIGHT_BACKWARD)]
            backwards = whole if not any(halves) else halves[0] if halves[0] == halves[1] and not whole else 0
            for label, times in (("F", done[Action(s, ActionKind.FORWARD, m)]), ("B", backwards)):
                if times != 1 and (label == "F" or schedule.training):
                    raise InvalidConfig(f"schedule {schedule.name}: {s}{label}{m} runs {times} times")
    return peak


def linearise(schedule: Schedule, stages: StageGraph) -> list[Action]:
    """All actions in an order in which each one's inputs are there; raises InvalidConfig on a deadlock."""
    producers = _producers(stages)
    at = dict.fromkeys(schedule.ranks, 0)
    done: set[Action] = set()
    order: list[Action] = []

    def backwarded(stage: int, m: int) -> bool:
        kinds = (ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD)
        return any(Action(stage, k, m) in done for k in kinds)

    def ready(a: Action) -> bool:
        if a.kind is ActionKind.FORWARD:
            return all(Action(p, ActionKind.FORWARD, a.microbatch) in done for p in producers[a.stage])
        if a.kind is ActionKind.WEIGHT_BACKWARD:
            return Action(a.stage, ActionKind.INPUT_BACKWARD, a.microbatch) in done
        if Action(a.stage, ActionKind.FORWARD, a.microbatch) not in done:
            return False
        return all(backwarded(c, a.microbatch) for c in stages[a.stage])

    moved = True
    while moved:
        moved = False
        for rank, actions in schedule.ranks.items():
            while at[rank] < len(actions) and ready(actions[at[rank]]):
                done.add(actions[at[rank]])
                order.append(actions[at[rank]])
                at[rank] += 1
                moved = True
    stuck = [f"rank {r} at {actions[at[r]]}" for r, actions in schedule.ranks.items() if at[r] < len(actions)]
    if stuck:
        raise InvalidConfig(f"schedule {schedule.name}: deadlock: {', '.join(stuck)}")
    return order


def _producers(stages: StageGraph) -> dict[int, set[int]]:
    producers: dict[int, set[int]] = {s: set() for s in stages}
    for s, to in stages.items():
        for t in to:
            producers[t].add(s)
    return producers


def _forwards(stage: int, microbatches: Sequence[int]) -> list[Action]:
    return [Action(stage, ActionKind.FORWARD, m) for m in microbatches]


def _backwards(stage: int, microbatches: Sequence[int]) -> list[Action]:
    return [Action(stage, ActionKind.BACKWARD, m) for m in microbatches]
