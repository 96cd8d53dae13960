"""Schedules as data: for each rank, the list of Actions that it executes in one step.

An Action prints as in torch.distributed.pipelining: `0F2` is stage 0's forward of micro-batch 2, `0B2` its backward.
GPipe: Huang et al., arXiv 1811.06965.  1F1B: PipeDream-flush, Narayanan et al., arXiv 2006.09503.
Stages form a DAG; what a chain's position is to the classical schedules, the longest distance to a sink is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import nearest
from nesa_ray.planning.plan import topological_stages


class ActionKind(Enum):
    """What is done with a micro-batch."""

    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True, slots=True)
class Action:
    """One stage's forward or backward of one micro-batch."""

    stage: int
    kind: ActionKind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


StageGraph = Mapping[int, set[int]]


@dataclass(frozen=True)
class Schedule:
    """Each rank's actions in order; rank i runs stage i's work."""

    name: str
    microbatches: int
    ranks: Mapping[int, tuple[Action, ...]]

    def __str__(self) -> str:
        return "\n".join(f"rank {r}: {' '.join(map(str, actions))}" for r, actions in self.ranks.items())


def distance_to_sink(stages: StageGraph) -> dict[int, int]:
    """Longest number of stages between each stage and the end; raises InvalidConfig on a cycle."""
    order = topological_stages({s: set(to) for s, to in stages.items()})
    if order is None:
        raise InvalidConfig("schedule: the stage graph has a cycle")
    distance: dict[int, int] = {}
    for s in reversed(order):
        distance[s] = max((distance[t] + 1 for t in stages[s]), default=0)
    return distance


def forward_only(stages: StageGraph, microbatches: int) -> Schedule:
    """Inference: every stage forwards every micro-batch."""
    return Schedule("forward_only", microbatches, {s: tuple(_forwards(s, range(microbatches))) for s in stages})


def gpipe(stages: StageGraph, microbatches: int) -> Schedule:
    """All forwards, then all backwards: keeps every micro-batch's activations."""
    ranks = {s: (*_forwards(s, range(microbatches)), *_backwards(s, range(microbatches))) for s in stages}
    return Schedule("gpipe", microbatches, ranks)


def one_f_one_b(stages: StageGraph, microbatches: int) -> Schedule:
    """1F1B: a stage d stages before the end starts with d forwards, then alternates: keeps d + 1 activations."""
    ranks = {}
    for s, distance in distance_to_sink(stages).items():
        warm = min(distance, microbatches)
        actions = [*_forwards(s, range(warm))]
        for m in range(microbatches - warm):
            actions += [Action(s, ActionKind.FORWARD, warm + m), Action(s, ActionKind.BACKWARD, m)]
        actions += _backwards(s, range(microbatches - warm, microbatches))
        ranks[s] = tuple(actions)
    return Schedule("1f1b", microbatches, {s: ranks[s] for s in stages})


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}


def make_schedule(name: str, stages: StageGraph, microbatches: int) -> Schedule:
    """The training schedule of that name; raises InvalidConfig when there is none, or no micro-batch."""
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise InvalidConfig(f"schedule: needs one of {known}, got {name!r}{nearest(name, SCHEDULES)}")
    if microbatches < 1:
        raise InvalidConfig(f"microbatches: needs at least 1, got {microbatches}")
    return SCHEDULES[name](stages, microbatches)


def dry_run(schedule: Schedule, stages: StageGraph) -> dict[int, int]:
    """Executes the schedule without computing; returns each stage's peak number of live micro-batches.

    Raises InvalidConfig, naming the first action of each rank that can't start, if the schedule deadlocks, and if a
    stage doesn't forward (and, in training, backward) each micro-batch exactly once.
    """
    order = linearise(schedule, stages)
    training = any(a.kind is ActionKind.BACKWARD for a in order)
    live: Counter[int] = Counter()
    peak = dict.fromkeys(stages, 0)
    for a in order:
        live[a.stage] += 1 if a.kind is ActionKind.FORWARD else -1
        peak[a.stage] = max(peak[a.stage], live[a.stage])
    done = Counter(order)
    for s in stages:
        for m in range(schedule.microbatches):
            for kind in (ActionKind.FORWARD, ActionKind.BACKWARD) if training else (ActionKind.FORWARD,):
                if done[Action(s, kind, m)] != 1:
                    raise InvalidConfig(
                        f"schedule {schedule.name}: {Action(s, kind, m)} runs {done[Action(s, kind, m)]} times"
                    )
    return peak


def linearise(schedule: Schedule, stages: StageGraph) -> list[Action]:
    """All actions in an order in which each one's inputs are there; raises InvalidConfig on a deadlock."""
    producers: dict[int, set[int]] = {s: set() for s in stages}
    for s, to in stages.items():
        for t in to:
            producers[t].add(s)
    at = dict.fromkeys(schedule.ranks, 0)
    done: set[Action] = set()
    order: list[Action] = []

    def ready(a: Action) -> bool:
        if a.kind is ActionKind.FORWARD:
            return all(Action(p, ActionKind.FORWARD, a.microbatch) in done for p in producers[a.stage])
        if Action(a.stage, ActionKind.FORWARD, a.microbatch) not in done:
            return False
        return all(Action(c, ActionKind.BACKWARD, a.microbatch) in done for c in stages[a.stage])

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


def _forwards(stage: int, microbatches: Sequence[int]) -> list[Action]:
    return [Action(stage, ActionKind.FORWARD, m) for m in microbatches]


def _backwards(stage: int, microbatches: Sequence[int]) -> list[Action]:
    return [Action(stage, ActionKind.BACKWARD, m) for m in microbatches]
