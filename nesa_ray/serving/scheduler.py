"""Which sequences are admitted, and what each step computes: plain bookkeeping, no tensors, no threads.

A sequence's tokens are known up to the last one sampled.  `scheduled` of them have been given to a step; the rest can
be given to the next: one token while it generates, a chunk of the prompt before.  Nothing else decides what is ready,
so chunks of one prompt follow each other through the pipeline, and a generating sequence waits for its own last step.
Where a step would come before its sequences' tokens are known, they are given it ahead: the tokens come to it from the
stage that chooses them (choices.py), and the stages are ready when they do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from nesa_ray.serving.blocks import Blocks
from nesa_ray.serving.pooling import MEAN
from nesa_ray.serving.request import Sampling

# Steps of each batch in flight that the waiting prompts are spread over.  Simulated with 64 requests under way on two
# equal stages: with 2, 3, 4 and 6 each works for 0.91, 0.93, 0.94 and 0.94 of the time, at 590, 600, 605 and 607 tokens
# a second, and a request's first token takes 320, 420, 500 and 660 ms.
_SPREAD = 4


@dataclass(eq=False, slots=True)
class Sequence:
    """One request under way.

    tokens     prompt and output so far
    blocks     its block table; covers at least the scheduled tokens
    scheduled  tokens given to steps since it was last admitted; ahead it is one more than are known
    latest     the number of the last of these steps
    steps      steps under way that will sample a token for it
    slot       its number at the stage that samples
    pooling    None: it generates; "mean" or "last": which of its hidden states make its embedding (pooling.py)
    adapter    number of the adapter it is computed with; 0: none
    """

    id: int
    tokens: list[int]
    prompt_tokens: int
    sampling: Sampling
    seed: int
    max_tokens: int
    blocks: list[int] = field(default_factory=list)
    scheduled: int = 0
    latest: int = 0
    published: int = 0
    steps: int = 0
    slot: int = -1
    cached_tokens: int = 0
    finished: bool = False
    pooling: str | None = None
    adapter: int = 0

    @property
    def pending(self) -> int:
        """Known tokens that no step has been given."""
        return len(self.tokens) - self.scheduled

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """`count` tokens of a sequence from `start`; `samples` when they end at the last known one.

    Of a sequence that is embedded, `pooled` of its last tokens' hidden states are; `embeds` when those are the last.
    `ahead` when the one token is still being chosen; a step's work that is comes first.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    pooled: int = 0
    embeds: bool = False
    ahead: bool = False

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Work:
        """The sequence's next `count` tokens."""
        last, start = count == sequence.pending, sequence.scheduled
        if sequence.pooling is None:
            return cls(sequence, start, count, last)
        return cls(sequence, start, count, False, count if sequence.pooling == MEAN else int(last), last)


class Scheduler:
    """Admits by free blocks, builds steps, and makes room by preemption.  Owned by the engine's loop.

    Stages wait for each other where one step is longer than the next.  So the prompts' tokens that wait are spread over
    the next steps, a share of them each, unless a step gets so small, less than `chunk` tokens, that a token takes
    longer in it.
    """

    def __init__(
        self, blocks: Blocks, *, max_sequences: int, max_batch_tokens: int, batches_in_flight: int, chunk: int
    ) -> None:
        self.blocks = blocks
        self.max_sequences, self.max_batch_tokens, self.chunk = max_sequences, max_batch_tokens, chunk
        self.batches_in_flight, self.queued = batches_in_flight, 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self._given = 0  # steps
        self._slots = list(range(max_sequences))[::-1]

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences to the running ones, in order, while slots and blocks last."""
        admitted = []
        while self.waiting and self._slots and self._take_blocks(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.slot = self._slots.pop()
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _take_blocks(self, sequence: Sequence) -> bool:
        known: list[int] = []
        if sequence.pooling != MEAN:  # which needs every hidden state
            known = self.blocks.match(sequence.tokens, sequence.adapter)
        more = self.blocks.needed(len(sequence.tokens)) - len(known)
        spare = len(self.running)  # a block for each to grow into, or it would soon be preempted again
        if self.blocks.free - self.blocks.idle(known) < more + spare:
            return False
        self.blocks.hold(known)
        taken = self.blocks.allocate(more)
        assert taken is not None
        sequence.blocks = [*known, *taken]
        sequence.published = len(known)
        sequence.scheduled = len(known) * self.blocks.size
        if not sequence.output_tokens:
            sequence.cached_tokens = sequence.scheduled
        return True

    def next(self, under_way: int) -> list[Work]:
        """The next step's work while so many are under way; empty when there is none, or no more are wanted.

        Behind those that keep the stages at work, `queued` more are wanted, in which tokens may still be being chosen;
        before, a step is given ahead only where nothing else is ready.
        """
        if under_way < self.batches_in_flight:
            return self.batch() or self.batch(ahead=True)
        return self.batch(ahead=True) if under_way < self.batches_in_flight + self.queued else []

    def batch(self, *, ahead: bool = False) -> list[Work]:
        """The next step's work, empty when nothing is ready: generating sequences first, then chunks of prompts.

        Generating sequences are shared evenly over the batches in flight, so that every stage has one to work on.
        With `ahead`, those whose tokens are chosen next are ready as well.
        """
        work: list[Work] = []
        for sequence in [s for s in self.running if s.pending == 1][: self._share]:
            if sequence.slot >= 0 and self._grow(sequence):
                work.append(Work.of(sequence, 1))
        work = [w for w in work if w.sequence.slot >= 0]  # a later one's growth may have preempted an earlier one
        if ahead:
            work = self._ahead(self._share - len(work)) + work
        waiting = sum(s.pending for s in self.running if s.pending > 1)
        spread = max(self.chunk - len(work), self.chunk // 4, waiting // (_SPREAD * self.batches_in_flight))
        room = min(self.max_batch_tokens - len(work), spread)
        for sequence in self.running:
            if sequence.pending > 1 and room > 0:
                count = min(sequence.pending, room)
                work.append(Work.of(sequence, count))
                room -= count
        return self._give(work)

    def _ahead(self, most: int) -> list[Work]:
        """Work for up to so many of the sequences whose tokens are chosen next, all by the same step.

        What is computed of one that ends before, by a token or a text, is lost.
        """
        waiting = [s for s in self.running if s.steps == 1 and not s.pending and s.output_tokens + 1 < s.max_tokens]
        first = min((s.latest for s in waiting), default=0)
        of = [s for s in waiting if s.latest == first][: max(0, most)]
        return [Work(s, s.scheduled, 1, samples=True, ahead=True) for s in of if self._room(s)]

    @property
    def _share(self) -> int:
        """Sequences of a step, so that every batch in flight has as many."""
        return -(-len(self.running) // self.batches_in_flight)

    def _give(self, work: list[Work]) -> list[Work]:
        self._given += 1
        for w in work:
            s = w.sequence
            s.scheduled += w.count
            s.latest = self._given
            s.steps += w.samples
            full = min(s.scheduled, len(s.tokens)) // self.blocks.size
            self.blocks.publish(s.blocks, s.tokens, s.published, full, s.adapter)
            s.published = full
        return work

    def _room(self, sequence: Sequence) -> bool:
        """Whether the sequence has a block for its next token, or gets one that is free."""
        if self.blocks.needed(sequence.scheduled + 1) > len(sequence.blocks):
            taken = self.blocks.allocate(1)
            sequence.blocks += taken or []
            return taken is not None
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Gives the sequence a block for its next token; preempts the youngest idle ones while there is none."""
        while not self._room(sequence):
            idle = [s for s in self.running if not s.steps]
            if not idle:
                return False
            self._preempt(idle[-1])
            if idle[-1] is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Frees the sequence's blocks; its keys and values are computed again when it is admitted again."""
        self.preemptions += 1
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Frees what finished or cancelled sequences hold, at once: steps under way don't need it (see blocks.py)."""
        for sequence in sequences:
            sequence.finished = True
            if sequence.slot >= 0:
                self._leave(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        self._slots.append(sequence.slot)
        sequence.blocks, sequence.scheduled, sequence.published, sequence.slot = [], 0, 0, -1
