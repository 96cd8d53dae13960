"""Answers in OpenAI's form: an engine's pieces as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nesa_ray.errors import InvalidInput, NesaError
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from nesa_ray.serving.refusals import refusal_body, status_of
from nesa_ray.serving.request import Completion, Logprob, Piece, Sampling, completion
from nesa_ray.serving.stream import Pace, Stream

CLIENT_LEFT = 499  # nobody reads it; the name is nginx's


class Shape(Protocol):
    """How an endpoint words its answers."""

    prefix: str
    kind: str
    chunk_kind: str

    def whole(self, index: int, prompt: Sequence[int], done: Completion) -> dict[str, Any]:
        """One choice of a complete answer."""

    def first(self, index: int, prompt: Sequence[int]) -> dict[str, Any] | None:
        """What a stream's choice starts with, if anything."""

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """One choice of a stream's chunk."""


async def answer(
    request: Request,
    engine: Engine,
    body: CompletionRequest | ChatRequest,
    prompts: list[list[int]],
    sampling: Sampling,
    shape: Shape,
    pace: Pace,
) -> Response:
    """The whole answer, or the stream, at a pace.  A client that leaves ends its outputs at once.

    Raises what submit raises.
    """
    outputs = Outputs(engine, prompts, body.choices, sampling, body.model, pace if body.stream else None)
    head = {
        "id": f"{shape.prefix}-{uuid.uuid4().hex}",
        "object": shape.kind,
        "created": int(time.time()),
        "model": body.model or engine.config.served_name,
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = _chunks(outputs, {**head, "object": shape.chunk_kind}, shape, usage, bool(body.return_token_ids))
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    pieces = await gather(request, outputs)
    if pieces is None:
        return Response(status_code=CLIENT_LEFT)
    done = [completion(s.prompt_tokens, [piece]) for s, piece in zip(outputs.streams, pieces, strict=True)]
    choices = [shape.whole(i, outputs.prompt(i), d) for i, d in enumerate(done)]
    return JSONResponse({**head, "choices": choices, "usage": outputs.usage([[piece] for piece in pieces])})


async def embeddings(request: Request, engine: Engine, body: EmbeddingRequest, prompts: list[list[int]]) -> Response:
    """One vector for each prompt, as numbers or as base64 of little-endian float32.  Raises what submit raises."""
    outputs = Outputs(engine, prompts, 1, Sampling(embed=True), body.model)
    pieces = await gather(request, outputs)
    if pieces is None:
        return Response(status_code=CLIENT_LEFT)
    data: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        assert piece.embedding is not None
        vector_D = piece.embedding.numpy().astype("<f4")
        if body.dimensions not in (None, len(vector_D)):
            raise InvalidInput(f"dimensions: the model's vectors have {len(vector_D)}, got {body.dimensions}")
        worded = b64encode(vector_D.tobytes()).decode() if body.encoding_format == "base64" else vector_D.tolist()
        data.append({"object": "embedding", "index": index, "embedding": worded})
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    model = body.model or engine.config.served_name
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


async def gather(request: Request, outputs: Outputs) -> list[Piece] | None:
    """Each output, whole; None when the client has left before, which ends them."""

    async def read() -> list[Piece]:
        return [await stream.whole() for stream in outputs.streams]

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.ensure_future(read()), asyncio.ensure_future(left())
    try:
        async with outputs:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return None
        return reading.result()
    finally:
        reading.cancel()
        leaving.cancel()


class Outputs:
    """All outputs of one HTTP request: their pieces as they come, or at a pace, and their end together."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[list[int]],
        choices: int,
        sampling: Sampling,
        model: str | None,
        pace: Pace | None = None,
    ) -> None:
        self._prompts, self._choices, self._pace = prompts, choices, pace
        self.streams: list[Stream] = []
        try:
            for prompt in prompts:
                for choice in range(choices):
                    self.streams.append(engine.stream(prompt, _seeded(sampling, choice), model=model))
        except BaseException:
            self._close()
            raise
        for stream in self.streams:
            stream.pace = pace

    def prompt(self, index: int) -> list[int]:
        """The prompt of one output."""
        return self._prompts[index // self._choices]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        if len(self.streams) == 1:
            async for piece in self.streams[0]:
                yield 0, piece
            return
        waiting = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(self.streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    index = waiting.pop(future)
                    piece = future.result()
                    yield index, piece
                    if piece.finish is None:
                        waiting[asyncio.ensure_future(anext(self.streams[index]))] = index
        finally:
            for future in waiting:
                future.cancel()

    async def __aenter__(self) -> Outputs:
        if self._pace is not None:
            self._pace.streams += len(self.streams)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pace is not None:
            self._pace.streams -= len(self.streams)
        self._close()

    def _close(self) -> None:
        for stream in self.streams:
            stream.close()

    def usage(self, received: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """OpenAI's token counts; a prompt with several outputs counts once."""
        prompt = sum(map(len, self._prompts))
        output = sum(len(p.token_ids) for pieces in received for p in pieces)
        cached = sum(pieces[-1].cached_tokens for pieces in received[:: self._choices] if pieces)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _seeded(sampling: Sampling, choice: int) -> Sampling:
    """Several outputs of one seeded prompt differ, and are repeatable."""
    if sampling.seed is None or not choice:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice + (1 << 63)) % (1 << 64) - (1 << 63))


async def _chunks(
    outputs: Outputs, head: dict[str, Any], shape: Shape, usage: bool, every_token: bool
) -> AsyncIterator[str]:
    """Server-sent events; the reader's leaving closes the outputs."""
    extra = {"usage": None} if usage else {}
    received: list[list[Piece]] = [[] for _ in outputs.streams]
    async with outputs:
        try:
            for index in range(len(outputs.streams)):
                first = shape.first(index, outputs.prompt(index))
                if first is not None:
                    yield event({**head, "choices": [first], **extra})
            async for index, piece in outputs:
                received[index].append(piece)
                if piece.text or piece.finish or piece.logprobs or every_token:
                    yield event({**head, "choices": [shape.part(index, piece)], **extra})
            if usage:
                yield event({**head, "choices": [], "usage": outputs.usage(received)})
            yield "data: [DONE]\n\n"
        except NesaError as e:
            status, kind, code = status_of(e)
            yield event(refusal_body(status, str(e), kind, code))


def event(value: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class TextShape:
    """/v1/completions"""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Engine, body: CompletionRequest) -> None:
        self._engine, self._body = engine, body
        self._offsets: dict[int, int] = {}

    def whole(self, index: int, prompt: Sequence[int], done: Completion) -> dict[str, Any]:
        echo = self._engine.decode(prompt) if self._body.echo else ""
        return self._choice(index, echo + done.text, done.logprobs, done.finish, done.token_ids)

    def first(self, index: int, prompt: Sequence[int]) -> dict[str, Any] | None:
        return self._choice(index, self._engine.decode(prompt), (), None, ()) if self._body.echo else None

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece.text, piece.logprobs, piece.finish, piece.token_ids)

    def _choice(
        self, index: int, text: str, logprobs: Sequence[Logprob], finish: str | None, ids: Sequence[int]
    ) -> dict[str, Any]:
        worded = None
        if self._body.logprobs is not None:
            tokens = [self._engine.token_text(x.token_id) for x in logprobs]
            offsets = []
            for token in tokens:
                offsets.append(self._offsets.get(index, 0))
                self._offsets[index] = offsets[-1] + len(token)
            worded = {
                "tokens": tokens,
                "token_logprobs": [x.logprob for x in logprobs],
                "top_logprobs": [{self._engine.token_text(t): v for t, v in x.top} for x in logprobs],
                "text_offset": offsets,
            }
        extra = {"token_ids": list(ids)} if self._body.return_token_ids else {}
        return {"index": index, "text": text, "logprobs": worded, "finish_reason": finish, **extra}


class ChatShape:
    """/v1/chat/completions"""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, engine: Engine, body: ChatRequest) -> None:
        self._engine, self._body = engine, body

    def whole(self, index: int, prompt: Sequence[int], done: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        return self._choice(index, {"message": message}, done.logprobs, done.finish, done.token_ids)

    def first(self, index: int, prompt: Sequence[int]) -> dict[str, Any] | None:
        return self._choice(index, {"delta": {"role": "assistant", "content": ""}}, (), None, ())

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"delta": {"content": piece.text} if piece.text else {}}
        return self._choice(index, delta, piece.logprobs, piece.finish, piece.token_ids)

    def _choice(
        self, index: int, said: dict[str, Any], logprobs: Sequence[Logprob], finish: str | None, ids: Sequence[int]
    ) -> dict[str, Any]:
        def word(token: int, value: float) -> dict[str, Any]:
            text = self._engine.token_text(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        worded = None
        if self._body.logprobs:
            worded = {
                "content": [
                    {**word(x.token_id, x.logprob), "top_logprobs": [word(t, v) for t, v in x.top]} for x in logprobs
                ],
                "refusal": None,
            }
        extra = {"token_ids": list(ids)} if self._body.return_token_ids else {}
        return {"index": index, **said, "logprobs": worded, "finish_reason": finish, **extra}
