"""The predicted timeline of a schedule: when each action of each rank runs, given stage times and links.

Ranks execute their lists as schedule.RankQueue says; an action starts when its rank is free and its inputs have
arrived.  A transfer takes the link's latency + bytes / bandwidth; transfers in one direction of one link follow each
other, and overlap compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nesa_ray.errors import InvalidConfig
from nesa_ray.planning.plan import Plan
from nesa_ray.planning.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    Schedule,
    StageGraph,
    StageTimes,
    Transfer,
    Transfers,
    dry_run,
    linearise,
    make_schedule,
    micro_batches_ahead,
    one_f_one_b,
    zero_bubble,
)

SLOWER = 1.2  # stages may turn out so much slower than predicted, and schedules should bear it
_STEPS = 4  # after which they are steady


@dataclass(frozen=True)
class Timeline:
    """Start and end of each action, in seconds since the step began."""

    schedule: Schedule
    start_s: Mapping[Action, float]
    end_s: Mapping[Action, float]

    @property
    def step_s(self) -> float:
        """Length of the step."""
        return max(self.end_s.values(), default=0.0)

    def busy_s(self, rank: int) -> float:
        """Seconds of work of one rank."""
        return sum(self.end_s[a] - self.start_s[a] for a in self.schedule.ranks[rank])

    @property
    def efficiency(self) -> float:
        """The busiest rank's share of the step: 1 - its bubble."""
        return max((self.busy_s(r) for r in self.schedule.ranks), default=0.0) / self.step_s if self.step_s else 1.0


def plan_times(plan: Plan) -> dict[int, StageTimes]:
    """A training plan's predicted compute: a third each for the forward and the gradients of inputs and weights."""
    third = {s.id: s.compute_s / 3 for s in plan.stages}
    return {i: StageTimes(forward_s=t, input_backward_s=t, weight_backward_s=t) for i, t in third.items()}


def plan_transfers(plan: Plan, stages: StageGraph) -> dict[tuple[int, int], Transfer]:
    """A training plan's predicted transfers: what a stage receives in the forward, in equal parts.

    It is half of all, or all where gradients are taken to go beside it (costing.py).
    """
    received = {s.id: s.receive_s / (1 if plan.overlap else 2) for s in plan.stages}
    producers = {s: [p for p, to in stages.items() if s in to] for s in stages}
    return {(p, s): Transfer(wire_s=received[s] / len(before)) for s, before in producers.items() for p in before}


def simulate(
    schedule: Schedule,
    stages: StageGraph,
    times: Mapping[int, StageTimes],
    transfers: Transfers | None = None,
    *,
    since: Mapping[int, float] | None = None,
) -> Timeline:
    """Runs the schedule on paper.  `transfers` is by (producer, consumer); gradients take the same, the other way.

    since  when each rank begins, 0 without it

    Raises InvalidConfig when the schedule deadlocks.
    """
    transfers = transfers or {}
    rank_of = {a.stage: r for r, actions in schedule.ranks.items() for a in actions}
    free = {r: since[r] if since is not None else 0.0 for r in schedule.ranks}
    wire_free: dict[tuple[int, int], float] = {}
    arrived: dict[Action, float] = {}
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}

    def send(a: Action, stage: int, kinds: Sequence[ActionKind], wire: Transfer) -> None:
        link = (rank_of[a.stage], rank_of[stage])
        leaves = max(end[a], wire_free.get(link, 0.0)) if link[0] != link[1] else end[a]
        if link[0] != link[1]:
            wire_free[link] = leaves + wire.wire_s
            leaves += wire.wire_s + wire.latency_s
        for to in (Action(stage, kind, a.microbatch) for kind in kinds):
            arrived[to] = max(arrived.get(to, 0.0), leaves)

    # In the order of time, so that transfers queue on a link as they leave.
    waiting = {a: _inputs(a, stages) for a in linearise(schedule, stages)}
    queues = {rank: schedule.queue(rank) for rank in schedule.ranks}

    def begins(a: Action) -> float:
        """When all that it receives is there; infinite if that isn't known yet."""
        known = all(any(x in end for x in alternatives) for alternatives in waiting[a])
        return arrived.get(a, 0.0) if known else math.inf

    while len(end) < len(waiting):
        ready: list[tuple[float, int, Action]] = []
        for rank, queue in queues.items():
            now = free[rank]
            a = queue.next(lambda head, now=now: begins(head) <= now)  # type: ignore[misc]
            if a is not None:
                ready.append((max(now, begins(a)), rank, a))
        at, rank, a = min(ready, key=lambda r: r[:2])
        start[a], end[a] = at, at + times[a.stage].of(a.kind)
        free[rank] = end[a]
        queues[rank].done(a)
        if a.kind is ActionKind.FORWARD:
            for s in stages[a.stage]:
                send(a, s, [ActionKind.FORWARD], transfers.get((a.stage, s), Transfer()))
        elif a.kind in (ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD):
            for s in (p for p, to in stages.items() if a.stage in to):
                kinds = [ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD]
                send(a, s, kinds, transfers.get((s, a.stage), Transfer()))
    return Timeline(schedule, start, end)


def step_ends_s(
    schedule: Schedule,
    stages: StageGraph,
    times: Mapping[int, StageTimes],
    transfers: Transfers | None = None,
    *,
    steps: int,
    barrier: bool = False,
) -> list[float]:
    """When each of several steps that follow each other is done, in seconds since the first began.

    Each rank begins a step when it is done with the one before, whatever the others do: what is left to do at the end
    fills others' beginning.  With a `barrier`, such as clipping by the norm over all stages, all begin together.
    """
    since, ends = dict.fromkeys(schedule.ranks, 0.0), []
    for _ in range(steps):
        timeline = simulate(schedule, stages, times, transfers, since=since)
        since = {r: max(timeline.end_s[a] for a in actions) for r, actions in schedule.ranks.items()}
        ends.append(max(since.values()))
        if barrier:
            since = dict.fromkeys(since, ends[-1])
    return ends


def steady_step_s(
    schedule: Schedule,
    stages: StageGraph,
    times: Mapping[int, StageTimes],
    transfers: Transfers | None = None,
    *,
    barrier: bool = False,
) -> float:
    """Seconds from step to step, when many follow each other."""
    steps = 2 if barrier else _STEPS
    first, *_, last = step_ends_s(schedule, stages, times, transfers, steps=steps, barrier=barrier)
    return (last - first) / (steps - 1)


def _inputs(a: Action, stages: StageGraph) -> list[tuple[Action, ...]]:
    """What must have ended before: of each tuple, one."""
    m = a.microbatch
    if a.kind is ActionKind.FORWARD:
        return [(Action(p, ActionKind.FORWARD, m),) for p, to in stages.items() if a.stage in to]
    if a.kind is ActionKind.WEIGHT_BACKWARD:
        return [(Action(a.stage, ActionKind.INPUT_BACKWARD, m),)]
    kinds = (ActionKind.BACKWARD, ActionKind.INPUT_BACKWARD)
    return [
        (Action(a.stage, ActionKind.FORWARD, m),),
        *(tuple(Action(s, k, m) for k in kinds) for s in stages[a.stage]),
    ]


def best_schedule(
    stages: StageGraph,
    microbatches: int,
    times: Mapping[int, StageTimes],
    transfers: Transfers | None = None,
    *,
    live_limit: Mapping[int, int] | None = None,
    barrier: bool = False,
) -> Schedule:
    """`schedule: auto`: the shortest steady step by simulation, then the least live, of those within `live_limit`.

    The shortest is the one that is so on average of stages as fast as `times` says and a fifth slower.  Where links are
    slow, 1F1B and zero bubble with as many micro-batches under way as fill them are tried too, and zero bubble with
    room for more, so that it can put off weight gradients for what others wait for, as long as that helps.
    Raises InvalidConfig when none fits.
    """
    slower = {s: t.slower(SLOWER) for s, t in times.items()}
    ahead = micro_batches_ahead(stages, times, transfers or {})
    found: list[tuple[float, int, Schedule]] = []

    def consider(schedule: Schedule) -> float:
        kept = dry_run(schedule, stages)
        of_both = (steady_step_s(schedule, stages, t, transfers, barrier=barrier) for t in (times, slower))
        seconds = sum(of_both) / 2
        if live_limit is None or all(kept[s] <= live_limit[s] for s in stages):
            found.append((seconds, sum(kept.values()), schedule))
        return seconds

    for name in SCHEDULES:
        consider(make_schedule(name, stages, microbatches, times))
    if any(ahead.values()):
        consider(one_f_one_b(stages, microbatches, ahead=ahead))
    shortest = math.inf
    for more in (0, 1, 2, 4, 8, 16):
        further = {s: n + more for s, n in ahead.items()}
        seconds = consider(zero_bubble(stages, microbatches, times, ahead=further, transfers=transfers))
        if more > 1 and seconds > 0.999 * shortest:
            break
        shortest = min(shortest, seconds)
    if not found:
        raise InvalidConfig(f"schedule: auto: none keeps to {dict(live_limit or {})} live micro-batches per stage")
    return min(found, key=lambda f: f[:2])[2]
