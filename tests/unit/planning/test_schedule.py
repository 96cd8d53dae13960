"""Schedules: golden text, the dry run's peaks, deadlocks found."""

import random

import pytest

from nesa_ray.errors import InvalidConfig
from nesa_ray.planning.schedule import (
    Action,
    ActionKind,
    Schedule,
    StageTimes,
    Transfer,
    dry_run,
    forward_only,
    gpipe,
    linearise,
    make_schedule,
    one_f_one_b,
    zero_bubble,
)  # fmt: skip
from nesa_ray.planning.simulate import best_schedule, simulate, steady_step_s, step_ends_s

CHAIN = {0: {1}, 1: {2}, 2: set()}
# 0 feeds 1 and 2, which run beside each other; both feed 3; 0 also skips to 3.
DIAMOND = {0: {1, 2, 3}, 1: {3}, 2: {3}, 3: set()}


def test_1f1b_on_a_chain() -> None:
    assert str(one_f_one_b(CHAIN, 4)) == "\n".join(
        [
            "rank 0: 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
            "rank 1: 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
            "rank 2: 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
        ]
    )


def test_1f1b_on_branches() -> None:
    assert str(one_f_one_b(DIAMOND, 3)) == "\n".join(
        [
            "rank 0: 0F0 0F1 0F2 0B0 0B1 0B2",
            "rank 1: 1F0 1F1 1B0 1F2 1B1 1B2",
            "rank 2: 2F0 2F1 2B0 2F2 2B1 2B2",
            "rank 3: 3F0 3B0 3F1 3B1 3F2 3B2",
        ]
    )


def test_gpipe_and_forward_only() -> None:
    assert str(gpipe({0: {1}, 1: set()}, 2)) == "rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1F1 1B0 1B1"
    assert str(forward_only({0: set()}, 3)) == "rank 0: 0F0 0F1 0F2"


TWO_RANKS = {s: s % 2 for s in range(4)}


def chain(stages: int) -> dict[int, set[int]]:
    return {s: {s + 1} if s + 1 < stages else set() for s in range(stages)}


def test_several_stages_on_a_rank() -> None:
    assert str(make_schedule("interleaved", chain(4), 2, rank_of=TWO_RANKS)) == "\n".join(
        [
            "rank 0: 0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
            "rank 1: 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
        ]
    )
    forward = forward_only(chain(4), 3, TWO_RANKS)
    assert str(forward) == "rank 0: 0F0 0F1 2F0 2F1 0F2 2F2\nrank 1: 1F0 1F1 3F0 3F1 1F2 3F2"
    dry_run(forward, chain(4))
    with pytest.raises(InvalidConfig, match="several stages on a rank need interleaved, got '1f1b'"):
        make_schedule("1f1b", chain(4), 2, rank_of=TWO_RANKS)


@pytest.mark.parametrize("per_rank", [2, 4])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_interleaving_shortens_the_bubble(ranks: int, per_rank: int) -> None:
    """The bubble of 1F1B, (ranks - 1) times a micro-batch's time on a rank, by the stages of a rank (2104.04473)."""
    microbatches, stages = 2 * ranks, chain(ranks * per_rank)
    times = {s: StageTimes(forward_s=1.0, input_backward_s=1.0, weight_backward_s=1.0) for s in stages}
    schedule = make_schedule("interleaved", stages, microbatches, times, rank_of={s: s % ranks for s in stages})
    dry_run(schedule, stages)
    assert simulate(schedule, stages, times).step_s == 3 * per_rank * microbatches + 3 * (ranks - 1)
    whole = {s: StageTimes(forward_s=per_rank, input_backward_s=per_rank, weight_backward_s=per_rank) for s in stages}
    plain = simulate(make_schedule("1f1b", chain(ranks), microbatches), chain(ranks), whole)
    assert plain.step_s == 3 * per_rank * (microbatches + ranks - 1)


@pytest.mark.parametrize("microbatches", [1, 2, 5, 9])
@pytest.mark.parametrize("stages", [CHAIN, DIAMOND, {0: set()}, {0: {2}, 1: {2}, 2: set()}])
def test_dry_run_peaks(stages: dict, microbatches: int) -> None:
    assert set(dry_run(gpipe(stages, microbatches), stages).values()) == {microbatches}
    peaks = dry_run(one_f_one_b(stages, microbatches), stages)
    depth = max(peaks.values())
    assert depth <= min(microbatches, len(stages))
    assert all(peaks[s] == 1 for s, after in stages.items() if not after)


def test_linearise_runs_every_action_once() -> None:
    schedule = one_f_one_b(DIAMOND, 5)
    order = linearise(schedule, DIAMOND)
    assert sorted(map(str, order)) == sorted(str(a) for actions in schedule.ranks.values() for a in actions)


def test_deadlock_names_the_ranks() -> None:
    f, b = ActionKind.FORWARD, ActionKind.BACKWARD
    stuck = Schedule("hand", 1, {0: (Action(0, f, 0), Action(0, b, 0)), 1: (Action(1, b, 0), Action(1, f, 0))})
    with pytest.raises(InvalidConfig, match="deadlock: rank 0 at 0B0, rank 1 at 1B0"):
        dry_run(stuck, {0: {1}, 1: set()})


def test_missing_action_is_named() -> None:
    f = ActionKind.FORWARD
    with pytest.raises(InvalidConfig, match="0F1 runs 0 times"):
        dry_run(Schedule("hand", 2, {0: (Action(0, f, 0),)}), {0: set()})


def test_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(InvalidConfig, match="did you mean '1f1b'"):
        make_schedule("1f1", CHAIN, 2)
    with pytest.raises(InvalidConfig, match="microbatches: needs at least 1, got 0"):
        make_schedule("1f1b", CHAIN, 0)


def test_a_gradient_takes_the_wire_once_in_each_direction() -> None:
    stages = {0: {1}, 1: set()}
    times = dict.fromkeys(stages, StageTimes(forward_s=1e-6, input_backward_s=1e-6, weight_backward_s=1e-6))
    transfers = {(0, 1): Transfer(wire_s=1.0, latency_s=10.0)}
    for name in ("gpipe", "zero_bubble"):
        lone_s = simulate(make_schedule(name, stages, 1, times), stages, times, transfers).step_s
        assert lone_s == pytest.approx(2 * (1 + 10), rel=1e-4)
    gpipe_s = simulate(make_schedule("gpipe", stages, 8, times), stages, times, transfers).step_s
    assert gpipe_s == pytest.approx(2 * (8 + 10), rel=1e-4)  # one direction after the other


@pytest.mark.parametrize("latency_s", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("wire_s", [0.0, 0.5, 4.0])
def test_enough_micro_batches_are_under_way_to_fill_the_links(latency_s: float, wire_s: float) -> None:
    microbatches, stages = 32, {0: {1}, 1: {2}, 2: set()}
    times = dict.fromkeys(stages, StageTimes())
    transfers = {(0, 1): Transfer(wire_s, latency_s), (1, 2): Transfer(wire_s, latency_s)}
    best = best_schedule(stages, microbatches, times, transfers)
    assert sum(dry_run(best, stages).values()) <= 3 * microbatches
    best_s = steady_step_s(best, stages, times, transfers)
    pace_s, there_and_back_s = max(3.0, wire_s), 2 * 2 * (wire_s + latency_s) + 3 * 3
    assert best_s <= microbatches * pace_s + 1.35 * there_and_back_s
    if latency_s:
        plain = min(
            steady_step_s(make_schedule(n, stages, microbatches, times), stages, times, transfers)
            for n in ("1f1b", "zero_bubble")
        )
        assert best_s < plain
        few = best_schedule(stages, microbatches, times, transfers, live_limit=dict.fromkeys(stages, 3))
        assert max(dry_run(few, stages).values()) <= 3


def test_the_order_bears_stages_that_are_slower_than_predicted() -> None:
    """Whatever stages turn out to take, the step is little more than what links or the slowest stage need."""
    stages = {0: {1}, 1: set()}
    times = dict.fromkeys(stages, StageTimes(forward_s=16.4, input_backward_s=16.4, weight_backward_s=16.4))
    transfers = {(0, 1): Transfer(wire_s=50.5, latency_s=51.5)}
    best = best_schedule(stages, 16, times, transfers)
    for factor in (0.8, 1.0, 1.1, 1.2, 1.5):
        slower = {s: t.slower(factor) for s, t in times.items()}
        busy_s = 3 * 16 * 16.4 * factor
        # First activations there, one message after the other, last gradients back, and what comes before and after.
        wires_s = 17 * 50.5 + 2 * 51.5 + 5 * 16.4 * factor
        least_s = max(busy_s, wires_s)
        assert 0.999 * least_s < steady_step_s(best, stages, slower, transfers) < 1.07 * least_s


def test_steps_overlap_but_for_a_barrier() -> None:
    """The last stage is idle at a step's beginning, the first at its end: following steps fill both, with room to."""
    stages, times = {0: {1}, 1: set()}, dict.fromkeys((0, 1), StageTimes())
    roomy = zero_bubble(stages, 4, times, ahead={0: 3, 1: 0})
    together = step_ends_s(roomy, stages, times, steps=3, barrier=True)
    assert together == [simulate(roomy, stages, times).step_s * n for n in (1, 2, 3)]
    assert steady_step_s(roomy, stages, times, barrier=True) == together[0] > 12
    assert steady_step_s(roomy, stages, times) == 12  # each stage computes 4 x 3 all the time
    plain = one_f_one_b(stages, 4)
    assert steady_step_s(plain, stages, times) == simulate(plain, stages, times).step_s == 15
    assert dry_run(roomy, stages) == {0: 4, 1: 4}


class Chance:
    """What has arrived, by chance."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, action: Action) -> bool:
        return self._random.random() < 0.5


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("stages", [CHAIN, DIAMOND])
def test_weight_gradients_fill_what_is_waited(stages: dict, seed: int) -> None:
    """Everything once, in the list's order but for weight gradients, which have theirs; within the room."""
    ahead = dict.fromkeys(stages, seed % 5)
    schedule = zero_bubble(stages, 7, ahead=ahead)
    for rank, actions in schedule.ranks.items():
        queue, arrived, ran = schedule.queue(rank), Chance(seed), []
        while (a := queue.next(arrived)) is not None:
            queue.done(a)
            ran.append(a)
        for weights in (False, True):
            kept = [[a for a in of if (a.kind is ActionKind.WEIGHT_BACKWARD) == weights] for of in (ran, actions)]
            assert kept[0] == kept[1]
        at = {a: i for i, a in enumerate(ran)}
        live = 0
        for a in ran:
            live += {ActionKind.FORWARD: 1, ActionKind.WEIGHT_BACKWARD: -1}.get(a.kind, 0)
            assert live <= schedule.room[rank]
            if a.kind is ActionKind.WEIGHT_BACKWARD:
                assert at[a] > at[Action(rank, ActionKind.INPUT_BACKWARD, a.microbatch)]
