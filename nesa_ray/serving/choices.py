"""The tokens that are chosen, on their way from the stage that chooses them straight to those that read them.

The engine gives sequences steps ahead (scheduler.py): their tokens it doesn't know yet, the stages do.
"""

from __future__ import annotations

from collections import deque

import torch

from nesa_ray.runtime.channel import Channel, Kind, Tag
from nesa_ray.serving.step import Step

CHOSEN = "chosen"


class Choices:
    """What a stage that reads tokens hears of those that steps choose: the last one of each slot."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._open: deque[tuple[int, list[int]]] = deque()  # steps not heard of, and the slots whose tokens they choose
        self._token: dict[int, int] = {}

    def tokens(self, index: int, step: Step) -> torch.Tensor:
        """The step's tokens, int64 [T]; waits for those that are still being chosen.  To be asked for every step."""
        slots = step.slots_S.tolist()
        while self._open and self._channel.has(self._tag()):
            self._hear()
        ahead = set(slots[: step.ahead])
        while any(not ahead.isdisjoint(chosen) for _, chosen in self._open):
            self._hear()
        if slots:
            self._open.append((index, slots))
        if not step.ahead:
            return step.tokens_T
        return torch.cat((torch.tensor([self._token[s] for s in slots[: step.ahead]]), step.tokens_T[step.ahead :]))

    def _tag(self) -> Tag:
        return Tag(Kind.CONTROL, CHOSEN, self._open[0][0])

    def _hear(self) -> None:
        chosen = self._channel.recv(self._tag())
        assert chosen is not None
        _, slots = self._open.popleft()
        self._token.update((slot, int(row[0])) for slot, row in zip(slots, chosen.tolist(), strict=True))
