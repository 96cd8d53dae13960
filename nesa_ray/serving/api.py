"""The OpenAI-compatible HTTP application over an Engine: the routes, and what is asked of each."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from nesa_ray.errors import InvalidInput
from nesa_ray.serving import answers
from nesa_ray.serving.answers import ChatShape, TextShape, answer
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.endpoint import endpoint
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.keys import ApiKeys
from nesa_ray.serving.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from nesa_ray.serving.schema import description
from nesa_ray.serving.stream import Pace, affordable_pieces_per_s

GUARDED = ("/v1/",)  # where keys are needed, if there are any
COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions
MAX_OUTPUTS = 256  # prompts × n of one request
_PAGE = Path(__file__).with_name("playground.html")
_PAGE_HEADERS = {  # the page holds all that it needs, and speaks to this endpoint alone
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_LONG_TEXT = 1 << 14  # characters; longer ones are turned into tokens beside the event loop


def application(engine_of: Callable[[], Engine], config: ServeConfig, keys: ApiKeys | None = None) -> FastAPI:
    """The routes.  `engine_of` is called at each request; `keys` are those of `config`, unless read already."""
    keys = keys or ApiKeys.of(config)
    app = endpoint(engine_of, config, keys, GUARDED)
    app.openapi = functools.cache(lambda: description(app, guarded=GUARDED if keys else ()))  # type: ignore[method-assign]
    pace = Pace(config.stream_chunks_per_s or affordable_pieces_per_s())
    created, page = int(time.time()), _PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/status")
    async def status() -> dict[str, Any]:
        """What the playground shows."""
        return await asyncio.to_thread(engine_of().measure)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        engine = engine_of()
        return {"object": "list", "data": [_model_card(engine, name, created) for name in engine.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        engine = engine_of()
        engine.check_model(name)
        return _model_card(engine, name, created)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        engine = engine_of()
        engine.check_model(body.model)
        given = body.prompts()
        _check_outputs(len(given) * body.choices)
        limit = body.max_tokens or engine.config.max_tokens or COMPLETION_TOKENS
        sampling = body.sampling(limit, body.logprobs)
        prompts = [await _tokens(engine, p) for p in given]
        return await answer(request, engine, body, prompts, sampling, TextShape(engine, body), pace)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        engine = engine_of()
        engine.check_model(body.model)
        _check_outputs(body.choices)
        sampling = body.sampling(body.max_completion_tokens or body.max_tokens, body.logprobs_asked())
        prompt = await _tokens(engine, _chat_text(engine, body), special=False)
        return await answer(request, engine, body, [prompt], sampling, ChatShape(engine, body), pace)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        engine = engine_of()
        engine.check_model(body.model)
        given = body.inputs()
        _check_outputs(len(given))
        prompts = [await _tokens(engine, p) for p in given]
        return await answers.embeddings(request, engine, body, prompts)

    return app


async def _tokens(engine: Engine, prompt: str | list[int], *, special: bool = True) -> list[int]:
    if isinstance(prompt, str) and len(prompt) > _LONG_TEXT:
        return await asyncio.to_thread(engine.tokenize, prompt, special=special)
    return engine.tokenize(prompt, special=special)


def _chat_text(engine: Engine, body: ChatRequest) -> str:
    if engine.tokenizer is None or not getattr(engine.tokenizer, "chat_template", None):
        raise InvalidInput("messages: the model has no chat template; use /v1/completions")
    render = engine.tokenizer.apply_chat_template
    given = body.chat_template_kwargs or {}
    own = given.keys() & inspect.signature(render).parameters.keys()
    if own:
        raise InvalidInput(f"chat_template_kwargs: needs the template's own variables, got {min(own)!r}")
    try:
        return render([m.plain() for m in body.messages], tokenize=False, add_generation_prompt=True, **given)
    except Exception as e:  # a template is code that comes with the model, and may raise anything
        said = str(e).splitlines() or [type(e).__name__]
        raise InvalidInput(f"messages: don't fit the model's chat template: {said[0]}") from None


def _model_card(engine: Engine, name: str, created: int) -> dict[str, Any]:
    base = engine.config.served_name
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "nesa_ray",
        "max_model_len": engine.blueprint.context,
        "parent": base if name != base else None,
    }


def _check_outputs(count: int) -> None:
    if count > MAX_OUTPUTS:
        raise InvalidInput(f"n: at most {MAX_OUTPUTS} outputs in one request, got {count}")
