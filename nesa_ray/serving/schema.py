"""The OpenAPI description: FastAPI's of the requests, the openai package's own types for the answers.

Made when it is first asked for: the types take most of a second to import, which serving doesn't need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/"
_JSON, _EVENTS, _PLAIN = "application/json", "text/event-stream", "text/plain"
_TEXT: Mapping[str, Mapping[str, Any]] = {
    _PLAIN: {"type": "string"},
    # One event: a chunk as OpenAI's streams have them, an error, or [DONE].
    _EVENTS: {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}},
}


class Health(BaseModel):
    """GET /health"""

    status: str
    live: bool
    ready: bool


class Status(BaseModel):
    """GET /status.  `stage_loads`: each stage's share of the time in which it computed, lately."""

    model: str
    adapters: list[str]
    state: str
    context: int
    running: int
    waiting: int
    cache_blocks: int
    cache_blocks_used: int
    output_tokens: int
    stage_loads: list[float]


def description(app: FastAPI, *, guarded: tuple[str, ...]) -> dict[str, Any]:
    """The whole of it; paths that start with one of `guarded` need an API key."""
    made: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = made["components"]["schemas"]
    answers = _answers()
    models = list({m: None for of_path in answers.values() for m in of_path.values() if m is not None})
    references, defined = models_json_schema(
        [(m, "serialization") for m in models], ref_template=_REFERENCE + "{model}"
    )
    schemas |= defined["$defs"]
    for path, of_path in answers.items():
        for operation in made["paths"][path].values():
            operation["responses"]["200"]["content"] = {
                kind: {"schema": references[model, "serialization"] if model is not None else _TEXT[kind]}
                for kind, model in of_path.items()
            }
    for unused in {"HTTPValidationError", "ValidationError"} & schemas.keys():
        del schemas[unused]
    name_keys(made, guarded)
    return made


def name_keys(described: dict[str, Any], guarded: tuple[str, ...]) -> None:
    """Says in a description that paths that start with one of `guarded` need an API key."""
    if not guarded:
        return
    described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in described["paths"].items():
        for operation in operations.values() if path.startswith(guarded) else ():
            operation["security"] = [{"key": []}]


def _answers() -> Mapping[str, Mapping[str, type[BaseModel] | None]]:
    """path -> media type -> what comes; None: see _TEXT."""
    from openai.types import Completion, CreateEmbeddingResponse, Embedding, Model
    from openai.types.chat import ChatCompletion

    class Vector(Embedding):
        """As numbers, or as base64 of little-endian float32."""

        embedding: list[float] | str  # type: ignore[assignment]

    class Embeddings(CreateEmbeddingResponse):
        """POST /v1/embeddings"""

        data: list[Vector]  # type: ignore[assignment]

    class ModelList(BaseModel):
        """GET /v1/models"""

        object: str
        data: list[Model]

    return {
        "/health": {_JSON: Health},
        "/status": {_JSON: Status},
        "/metrics": {_PLAIN: None},
        "/v1/models": {_JSON: ModelList},
        "/v1/models/{name}": {_JSON: Model},
        "/v1/completions": {_JSON: Completion, _EVENTS: None},
        "/v1/chat/completions": {_JSON: ChatCompletion, _EVENTS: None},
        "/v1/embeddings": {_JSON: Embeddings},
    }
