"""A request's output for an asynchronous reader."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nesa_ray.errors import NesaError
from nesa_ray.serving.request import Piece, Sampling, joined

if TYPE_CHECKING:
    from nesa_ray.serving.engine import Engine


class Stream:
    """An asynchronous iterator over a request's pieces.  Closing it before the end cancels the request."""

    def __init__(
        self, engine: Engine, prompt: str | Sequence[int], sampling: Sampling, model: str | None = None
    ) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._pieces: list[Piece] = []
        self._error: NesaError | None = None
        self._news = asyncio.Event()
        self._ended = False
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
        self._news.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Piece:
        """All that has come since the last: a reader that is slow gets more at a time."""
        if self._ended:
            raise StopAsyncIteration
        try:
            await self._news.wait()
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

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._request)
