import random
from collections import deque

import pytest

from nesa_ray.serving.blocks import Blocks
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Scheduler, Sequence, Work


def sequence(number: int, tokens: int, output: int = 1) -> Sequence:
    return Sequence(number, [number % 3] * tokens, tokens, Sampling(), 0, output)


def scheduler(blocks: int = 64, **options: int) -> Scheduler:
    given = {"max_sequences": 8, "max_batch_tokens": 16, "batches_in_flight": 2, "chunk": 64, **options}
    return Scheduler(Blocks(blocks, 4, prefix_cache=False), **given)


def finish(one: Scheduler, work: list[Work]) -> None:
    """A step's tokens have come back."""
    for w in work:
        if w.samples:
            w.sequence.steps -= 1
            if not w.sequence.finished:
                w.sequence.tokens.append(1)
                if w.sequence.output_tokens >= w.sequence.max_tokens:
                    one.remove([w.sequence])


def test_a_prompt_is_cut_into_chunks_that_follow_each_other_through_the_pipeline() -> None:
    one = scheduler()
    one.add(sequence(1, 40))
    one.admit()
    steps = [one.batch() for _ in range(3)]
    assert [(w.start, w.count, w.samples) for (w,) in steps] == [(0, 16, False), (16, 16, False), (32, 8, True)]
    assert one.batch() == []


def test_waiting_prompts_are_spread_over_several_steps_in_chunks_of_some_size() -> None:
    one = scheduler(chunk=4, max_batch_tokens=32)
    one.add(sequence(1, 40))
    one.admit()
    assert [sum(w.count for w in one.batch()) for _ in range(11)] == [5, *[4] * 8, 3, 0]
    one = scheduler(blocks=200, chunk=4, max_batch_tokens=32)
    one.add(sequence(1, 400))
    one.admit()
    assert sum(w.count for w in one.batch()) == 32


def test_generating_sequences_count_in_a_steps_size() -> None:
    one = scheduler(chunk=8, max_batch_tokens=32)
    for i in range(6):
        one.add(sequence(i, 1, output=9))
    one.admit()
    one.add(sequence(7, 40))
    one.admit()
    assert [(len(work), sum(w.count for w in work)) for work in (one.batch(), one.batch())] == [(5, 9), (3, 8)]


def test_generating_sequences_are_shared_over_the_batches_in_flight() -> None:
    one = scheduler(max_batch_tokens=64)
    for i in range(6):
        one.add(sequence(i, 5, output=9))
    one.admit()
    finish(one, one.batch())
    first, second = one.batch(), one.batch()
    assert [len(first), len(second)] == [3, 3]
    assert not {w.sequence.id for w in first} & {w.sequence.id for w in second}
    assert one.batch() == []


def test_a_sequence_alone_is_given_one_step_ahead_while_it_may_go_on() -> None:
    one = scheduler()
    only = sequence(1, 5, output=4)
    one.add(only)
    one.admit()
    (first,) = one.batch()
    (second,) = one.batch(ahead=True)
    assert (second.start, second.count, second.samples, second.ahead) == (5, 1, True, True)
    assert one.batch() == one.batch(ahead=True) == []  # its token isn't known to anyone
    finish(one, [first])
    assert one.batch() == []
    (third,) = one.batch(ahead=True)
    finish(one, [second])
    (fourth,) = one.batch(ahead=True)
    finish(one, [third])
    assert one.batch() == one.batch(ahead=True) == []  # the fourth token is the last
    finish(one, [fourth])
    assert only.finished
    assert one.blocks.free == one.blocks.count


def test_a_step_has_work_ahead_first_then_known_tokens_then_prompts() -> None:
    one = scheduler(max_batch_tokens=64)
    for i in range(4):
        one.add(sequence(i, 4, output=9))
    one.admit()
    finish(one, one.batch())
    one.chunk = 8
    assert [w.sequence.id for w in one.batch()] == [0, 1]
    one.add(sequence(4, 20, output=9))
    one.admit()
    steps = [[(w.sequence.id, w.count, w.ahead) for w in one.batch(ahead=True)] for _ in range(3)]
    assert steps[0] == [(0, 1, True), (2, 1, False), (3, 1, False), (4, 5, False)]
    assert steps[1] == [(1, 1, True), (4, 7, False)]  # which comes by the same step as 0's, where there was no room
    assert steps[2] == [(2, 1, True), (3, 1, True), (4, 6, False)]


def test_steps_ahead_take_those_who_have_waited_longest_and_preempt_nobody() -> None:
    one = scheduler(blocks=6, max_batch_tokens=64)
    for i in range(3):
        one.add(sequence(i, 4, output=9))
    one.admit()
    finish(one, one.batch())
    assert [[w.sequence.id for w in one.batch()] for _ in range(2)] == [[0, 1], [2]]
    finish(one, [Work(one.running[0], 0, 1, True)])
    assert [w.sequence.id for w in one.batch()] == [0]
    assert [w.sequence.id for w in one.batch(ahead=True)] == [1]  # 2's token comes by a later step than 1's
    assert [w.sequence.id for w in one.batch(ahead=True)] == [2]
    tight = scheduler(blocks=3, max_batch_tokens=64)
    for i in range(2):
        tight.add(sequence(i, 3, output=9))
    tight.admit()
    finish(tight, tight.batch())
    assert len(tight.batch()) == len(tight.batch()) == 1
    assert [w.start for w in tight.batch(ahead=True)] == [4]
    assert tight.batch(ahead=True) == []  # there is no block for the other's fifth token
    assert tight.preemptions == 0


def test_a_block_is_known_once_its_last_token_is() -> None:
    one = Scheduler(Blocks(8, 4), max_sequences=8, max_batch_tokens=16, batches_in_flight=2, chunk=64)
    text = [3, 1, 4, 1, 5, 9, 2]
    one.add(Sequence(1, list(text), 7, Sampling(), 0, 9))
    one.admit()
    work = one.batch()
    one.batch(ahead=True)
    assert len(one.blocks.match([*text, 1, 0])) == 1
    finish(one, work)
    one.batch(ahead=True)
    assert len(one.blocks.match([*text, 1, 0])) == 2


def test_admission_is_in_order_and_by_free_blocks() -> None:
    one = scheduler(blocks=10)
    for i, tokens in enumerate((16, 28, 4)):
        one.add(sequence(i, tokens))
    assert [s.id for s in one.admit()] == [0]
    assert [s.id for s in one.waiting] == [1, 2]
    one.remove([one.running[0]])
    assert [s.id for s in one.admit()] == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_everything_ends_whatever_is_cancelled_or_preempted(seed: int) -> None:
    rng = random.Random(seed)
    one = scheduler(blocks=rng.randint(14, 40), batches_in_flight=rng.randint(1, 3))
    one.queued = 1
    todo = [sequence(i, rng.randint(1, 30), rng.randint(1, 25)) for i in range(30)]
    everything, under_way = list(todo), deque[list[Work]]()
    for _ in range(10_000):
        if todo and rng.random() < 0.3:
            one.add(todo.pop())
        if rng.random() < 0.02 and one.running:
            one.remove([rng.choice(one.running)])
        one.admit()
        while work := one.next(len(under_way)):
            held = [b for s in one.running for b in s.blocks]
            assert len(held) == len(set(held))
            assert all(len(w.sequence.blocks) * 4 >= w.start + w.count for w in work)
            assert all(w.sequence.output_tokens + w.sequence.steps <= w.sequence.max_tokens for w in work)
            assert sum(w.count for w in work) <= one.max_batch_tokens
            under_way.append(work)
        if under_way:
            finish(one, under_way.popleft())
        elif not todo and not one.running and not one.waiting:
            break
    assert all(s.finished for s in everything)
    assert one.blocks.free == one.blocks.count
