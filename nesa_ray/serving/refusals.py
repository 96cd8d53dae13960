"""Errors as HTTP answers, all in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from nesa_ray.errors import ContextExceeded, InvalidInput, NesaError, Overloaded, Timeout, UnknownModel

RETRY_AFTER_S = 1


class RefusalDetail(BaseModel):
    """What OpenAI's errors say: `param` is the field that is wrong, where one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """The body of every answer that isn't a success."""

    error: RefusalDetail


_STATUS: tuple[tuple[type[NesaError], int, str, str | None], ...] = (
    (UnknownModel, 404, "invalid_request_error", "model_not_found"),
    (ContextExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    (InvalidInput, 400, "invalid_request_error", None),
    (Overloaded, 429, "rate_limit_error", "overloaded"),
    (Timeout, 504, "server_error", "timeout"),
    (NesaError, 503, "server_error", None),
)


def refusal_of(error: NesaError) -> JSONResponse:
    """The answer for an error of ours."""
    status, kind, code = status_of(error)
    return refusal(status, str(error), kind=kind, code=code)


def status_of(error: NesaError) -> tuple[int, str, str | None]:
    """(HTTP status, OpenAI's type, its code)"""
    return next(rest for known, *rest in _STATUS if isinstance(error, known))  # type: ignore[return-value]


def refusal(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    besides: Mapping[str, Any] | None = None,
) -> JSONResponse:
    """An answer in OpenAI's form, `besides` in its body too.  A message that starts with "field:" names the field."""
    # A lone surrogate in what the client sent, quoted in the message, has no UTF-8 form.
    message = message.encode(errors="replace").decode()
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({**(besides or {}), **refusal_body(status, message, kind, code)}, status, headers)


def refusal_body(status: int, message: str, kind: str, code: str | None) -> dict[str, Any]:
    """The JSON of an error: of an answer, or of a stream's last event."""
    field, colon, _ = message.partition(":")
    named = field if colon and status < 429 and field.replace("_", "").replace(".", "").isalnum() else None
    return {"error": {"message": message, "type": kind, "param": named, "code": code}}
