"""The OpenAI-compatible HTTP application over an Engine."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from nesa_ray.errors import InvalidInput, NesaError, Overloaded
from nesa_ray.serving.engine import Engine, Stream, completion
from nesa_ray.serving.openai_types import ChatRequest, CompletionRequest
from nesa_ray.serving.request import Completion, Logprob, Piece, Sampling

COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions
MAX_BODY_BYTES = 16 << 20
MAX_OUTPUTS = 256  # prompts × n of one request


def application(engine_of: Callable[[], Engine]) -> FastAPI:
    """The routes; `engine_of` is called at each request."""
    app = FastAPI(title="nesa_ray", docs_url=None, redoc_url=None)
    app.add_middleware(_BodyLimit)
    app.add_exception_handler(NesaError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    created = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        engine_of().check_health()
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(engine_of(), created)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(engine_of(), name)
        return _model_card(engine_of(), created)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        engine = engine_of()
        _check_model(engine, body.model)
        limit = body.max_tokens or engine.config.max_tokens or COMPLETION_TOKENS
        prompts = [engine.tokenize(p) for p in body.prompts()]
        return await _respond(engine, body, prompts, body.sampling(limit, body.logprobs), _TextShape(engine, body))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        engine = engine_of()
        _check_model(engine, body.model)
        sampling = body.sampling(body.max_completion_tokens or body.max_tokens, body.logprobs_asked())
        return await _respond(engine, body, [_chat_prompt(engine, body)], sampling, _ChatShape(engine, body))

    return app


class _Shape(Protocol):
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


async def _respond(
    engine: Engine, body: CompletionRequest | ChatRequest, prompts: list[list[int]], sampling: Sampling, shape: _Shape
) -> Response:
    if len(prompts) * body.choices > MAX_OUTPUTS:
        raise InvalidInput(f"n: at most {MAX_OUTPUTS} outputs in one request, got {len(prompts) * body.choices}")
    outputs = _Outputs(engine, prompts, body.choices, sampling)
    head = {
        "id": f"{shape.prefix}-{uuid.uuid4().hex}",
        "object": shape.kind,
        "created": int(time.time()),
        "model": engine.config.served_name,
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = _chunks(outputs, {**head, "object": shape.chunk_kind}, shape, usage, bool(body.return_token_ids))
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    received: list[list[Piece]] = [[] for _ in outputs.streams]
    async with outputs:
        async for index, piece in outputs:
            received[index].append(piece)
    done = [completion(s.prompt_tokens, r) for s, r in zip(outputs.streams, received, strict=True)]
    choices = [shape.whole(i, outputs.prompt(i), d) for i, d in enumerate(done)]
    return JSONResponse({**head, "choices": choices, "usage": outputs.usage(received)})


class _Outputs:
    """All outputs of one HTTP request: their pieces as they come, and their end together."""

    def __init__(self, engine: Engine, prompts: list[list[int]], choices: int, sampling: Sampling) -> None:
        self._prompts, self._choices = prompts, choices
        self.streams: list[Stream] = []
        try:
            for prompt in prompts:
                for choice in range(choices):
                    self.streams.append(engine.stream(prompt, _seeded(sampling, choice)))
        except BaseException:
            self._close()
            raise

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

    async def __aenter__(self) -> _Outputs:
        return self

    async def __aexit__(self, *_: object) -> None:
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
    outputs: _Outputs, head: dict[str, Any], shape: _Shape, usage: bool, every_token: bool
) -> AsyncIterator[str]:
    """Server-sent events; the reader's leaving closes the outputs."""
    extra = {"usage": None} if usage else {}
    received: list[list[Piece]] = [[] for _ in outputs.streams]
    async with outputs:
        try:
            for index in range(len(outputs.streams)):
                first = shape.first(index, outputs.prompt(index))
                if first is not None:
                    yield _event({**head, "choices": [first], **extra})
            async for index, piece in outputs:
                received[index].append(piece)
                if piece.text or piece.finish or piece.logprobs or every_token:
                    yield _event({**head, "choices": [shape.part(index, piece)], **extra})
            if usage:
                yield _event({**head, "choices": [], "usage": outputs.usage(received)})
            yield "data: [DONE]\n\n"
        except NesaError as e:
            yield _event(_error_body(*_status_of(e), str(e)))


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _TextShape:
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


class _ChatShape:
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


def _chat_prompt(engine: Engine, body: ChatRequest) -> list[int]:
    if engine.tokenizer is None or not getattr(engine.tokenizer, "chat_template", None):
        raise InvalidInput("messages: the model has no chat template; use /v1/completions")
    try:
        text = engine.tokenizer.apply_chat_template(
            [m.plain() for m in body.messages],
            tokenize=False,
            add_generation_prompt=True,
            **(body.chat_template_kwargs or {}),
        )
    except Exception as e:  # a template is code that comes with the model, and may raise anything
        raise InvalidInput(f"messages: don't fit the model's chat template: {str(e).splitlines()[0]}") from None
    return engine.tokenize(text, special=False)


def _model_card(engine: Engine, created: int) -> dict[str, Any]:
    return {
        "id": engine.config.served_name,
        "object": "model",
        "created": created,
        "owned_by": "nesa_ray",
        "max_model_len": engine.blueprint.context,
    }


class _UnknownModel(InvalidInput):
    """A model that isn't served here."""


def _check_model(engine: Engine, name: str | None) -> None:
    if name is not None and name != engine.config.served_name:
        raise _UnknownModel(f"model: {name[:200]!r} isn't served here; {engine.config.served_name!r} is")


# -- errors, in OpenAI's form ----------------------------------------------------------------------------------------


def _status_of(error: NesaError) -> tuple[int, str, str | None]:
    """(HTTP status, OpenAI's type, its code)"""
    if isinstance(error, _UnknownModel):
        return 404, "invalid_request_error", "model_not_found"
    if isinstance(error, InvalidInput):
        return 400, "invalid_request_error", None
    if isinstance(error, Overloaded):
        return 429, "rate_limit_error", "overloaded"
    return 503, "server_error", None


def _error_body(status: int, kind: str, code: str | None, message: str) -> dict[str, Any]:
    field, colon, _ = message.partition(":")
    named = field if colon and status < 429 and field.replace("_", "").replace(".", "").isalnum() else None
    return {"error": {"message": message, "type": kind, "param": named, "code": code}}


def _error(status: int, kind: str, code: str | None, message: str) -> JSONResponse:
    # A lone surrogate in what the client sent, quoted in the message, has no UTF-8 form.
    message = message.encode(errors="replace").decode()
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(_error_body(status, kind, code, message), status, headers)


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, NesaError)
    return _error(*_status_of(error), str(error))


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [p for p in first["loc"][1:] if isinstance(p, int) or (p.isidentifier() and p not in ("str", "list"))]
    where = ".".join(map(str, place)) or "body"
    return _error(400, "invalid_request_error", None, f"{where}: {first['msg']}")


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _error(error.status_code, "invalid_request_error", None, str(error.detail))
    response.headers.update(error.headers or {})
    return response


class _BodyLimit:
    """Refuses a body larger than MAX_BODY_BYTES before it is read whole (a pure ASGI middleware)."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            message = f"body: at most {MAX_BODY_BYTES} bytes, got {int(length)}"
            await _error(413, "invalid_request_error", None, message)(scope, receive, send)
            return
        await self._app(scope, receive, send)
