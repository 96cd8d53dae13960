"""A request's output for an asynchronous reader."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nesa_ray.errors import NesaError
from nesa_ray.serving.request import Piece, Sampling, joined

if TYPE_CHECKING:
    from nesa_ray.serving.engine import Engine


def affordable_pieces_per_s() -> float:
    """So many that they take about a fortieth of this machine.

    One costs 1.4 ms of a core in the engine, the replica and Serve's own proxy, a tenth of that behind HAProxy.
    """
    behind_haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    return (160.0 if behind_haproxy else 16.0) * (os.cpu_count() or 1)


class Pace:
    """How many pieces a second all of its streams together hand out.

    Each costs HTTP as much as a token costs some models.  Where there would be more, a stream's tokens are handed out
    together, less often the more streams there are; its first and its last don't wait.
    """

    def __init__(self, pieces_per_s: float) -> None:
        self._pieces_per_s = pieces_per_s
        self.streams = 0  # that hand out pieces now

    @property
    def interval_s(self) -> float:
        """Seconds between two pieces of a stream."""
        return self.streams / self._pieces_per_s


class Stream:
    """An asynchronous iterator over a request's pieces.  Closing it before the end cancels the request.

    pace  that it keeps to once it is set
    """

    pace: Pace | None = None

    def __init__(
        self, engine: Engine, prompt: str | Sequence[int], sampling: Sampling, model: str | None = None
    ) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._pieces: list[Piece] = []
        self._error: NesaError | None = None
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._ended = False
        self._handed_s: float | None = None
        tokens = engine.tokenize(prompt)
        self.prompt_tokens = len(tokens)
        self._request = engine.submit(tokens, sampling, self._put, model)

    def _put(self, piece: Piece | NesaError) -> None:
        self._loop.call_soon_threadsafe(self._receive, piece)

    def _receive(self, piece: Piece | NesaError) -> None:
        if isinstance(piece, NesaError):
            self._error = piece
        else:
            self._pieces.append(piece)
        if self._error is not None or self._pieces[-1].finish is not None:
            self._over.set()
        self._news.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        """All that has come since the last: a reader that is slow gets more at a time."""
        if self._ended:
            raise StopAsyncIteration
        try:
            await self._news.wait()
            await self._due()
        except asyncio.CancelledError:
            self.close()
            raise
        self._news.clear()
        pieces, self._pieces = self._pieces, []
        if not pieces:
            assert self._error is not None
            self._ended = True
            raise self._error
        if self._error is not None:
            self._news.set()
        self._ended = pieces[-1].finish is not None
        return joined(pieces)

    async def _due(self) -> None:
        """Waits until a piece may be handed out."""
        now = self._loop.time()
        if self.pace is not None and self._handed_s is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), self._handed_s + self.pace.interval_s - now)
        self._handed_s = self._loop.time()

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._request)
