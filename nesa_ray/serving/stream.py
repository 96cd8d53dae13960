"""A request's output for an asynchronous reader."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary, ref

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


class _Inbox:
    """Takes pieces from engines' threads to an event loop: one call of the loop for all that have come meanwhile.

    A step has a token for each of its sequences, and to call a loop takes as long as to make one.
    """

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _Inbox]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._waiting: deque[tuple[Stream, Piece | NesaError]] = deque()
        self._called = False

    @classmethod
    def here(cls) -> _Inbox:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        if loop not in cls._of:
            cls._of[loop] = cls(loop)
        return cls._of[loop]

    def put(self, stream: Stream, piece: Piece | NesaError) -> None:
        """Called by an engine's thread.  Raises RuntimeError when the loop is closed."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            raise RuntimeError("stream: its event loop is closed")
        self._waiting.append((stream, piece))
        if not self._called:
            self._called = True
            loop.call_soon_threadsafe(self._hand_on)

    def _hand_on(self) -> None:
        self._called = False  # before it looks: what comes later calls again
        while self._waiting:
            stream, piece = self._waiting.popleft()
            stream.receive(piece)


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
        self._over = self._ended = False  # all has come; all has been handed out
        self._news, self._due = asyncio.Event(), asyncio.Event()
        self._handed_s: float | None = None
        tokens = engine.tokenize(prompt)
        self.prompt_tokens = len(tokens)
        inbox = _Inbox.here()
        self._request = engine.submit(tokens, sampling, lambda piece: inbox.put(self, piece), model)

    def receive(self, piece: Piece | NesaError) -> None:
        """Takes the next piece, or the failure that ends the request; called in the event loop."""
        if isinstance(piece, NesaError):
            self._error = piece
        else:
            self._pieces.append(piece)
        self._over = self._error is not None or self._pieces[-1].finish is not None
        self._news.set()
        if self._over:
            self._due.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        """All that has come since the last: a reader that is slow gets more at a time."""
        if self._ended:
            raise StopAsyncIteration
        try:
            await self._news.wait()
            await self._until_due()
        except asyncio.CancelledError:
            self.close()
            raise
        self._news.clear()
        return self._hand_out()

    async def whole(self) -> Piece:
        """All pieces in one, once the request has ended.  Raises the failure that ended it."""
        try:
            await self._due.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        if self._error is not None:
            self._pieces.clear()
        return self._hand_out()

    def _hand_out(self) -> Piece:
        pieces, self._pieces = self._pieces, []
        if not pieces:
            assert self._error is not None
            self._ended = True
            raise self._error
        if self._error is not None:
            self._news.set()
        self._ended = pieces[-1].finish is not None
        return joined(pieces)

    async def _until_due(self) -> None:
        """Waits until a piece may be handed out."""
        if self.pace is not None and self._handed_s is not None and not self._over:
            timer = self._loop.call_at(self._handed_s + self.pace.interval_s, self._due.set)
            await self._due.wait()
            timer.cancel()
            if not self._over:
                self._due.clear()
        self._handed_s = self._loop.time()

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._request)
