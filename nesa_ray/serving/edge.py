"""The application's outer edge, as ASGI middleware: API keys, the size of bodies, the time that a request may take."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
from starlette.exceptions import HTTPException

from nesa_ray.serving.answers import CLIENT_LEFT, event
from nesa_ray.serving.config import EndpointConfig
from nesa_ray.serving.keys import ApiKeys
from nesa_ray.serving.refusals import refusal, refusal_body

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_LAST_WORD_S = 1.0  # a client that doesn't read isn't waited for any longer


class Edge:
    """Lets a request in, or refuses it before anything is read or computed; ends one that takes too long."""

    def __init__(
        self,
        app: App,
        *,
        config: EndpointConfig,
        keys: ApiKeys,
        guarded: tuple[str, ...],
        answered: Callable[[str, int], None],
    ) -> None:
        """Paths that begin like one of `guarded` need a key; `answered` hears the route and status of every answer."""
        self._app, self._config, self._keys, self._guarded, self._answered = app, config, keys, guarded, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._config.max_body_bytes)
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if scope["path"].startswith(self._guarded) and not self._keys.allow(headers.get(b"authorization", b"")):
            message = "Incorrect API key: needs the header 'Authorization: Bearer KEY'"
            await refusal(401, message, code="invalid_api_key")(scope, receive, exchange.send)
        elif length.isdigit() and int(length) > self._config.max_body_bytes:
            await refusal(413, exchange.too_large(int(length)))(scope, receive, exchange.send)
        else:
            await self._pass_on(scope, exchange)
        self._answered(getattr(scope.get("route"), "path", "none"), exchange.status or CLIENT_LEFT)

    async def _pass_on(self, scope: Scope, exchange: _Exchange) -> None:
        limit_s = self._config.request_timeout_s
        try:
            with anyio.move_on_after(limit_s) as within:
                await self._app(scope, exchange.receive, exchange.send)
            if within.cancelled_caught:
                await exchange.end_late(scope, limit_s)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await exchange.end(scope, 500, "internal error; the endpoint's log has more", "server_error", None)


class _Exchange:
    """One request and its answer, as far as they have come."""

    def __init__(self, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self._receive, self._send, self._max_bytes = receive, send, max_body_bytes
        self._received_bytes = 0
        self._body_complete = self._complete = False
        self.status: int | None = None
        self._is_stream = False

    def too_large(self, length: int) -> str:
        """What to say of a body of so many bytes or more."""
        return f"body: at most {self._max_bytes} bytes, got {length}"

    async def receive(self) -> Message:
        """Counts what has no declared length.  Raises HTTPException."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._received_bytes += len(message.get("body", b""))
            self._body_complete = not message.get("more_body", False)
            if self._received_bytes > self._max_bytes:
                raise HTTPException(413, self.too_large(self._received_bytes))
        return message

    async def send(self, message: Message) -> None:
        """Passes a part of the answer on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._is_stream = any(
                k == b"content-type" and v.startswith(b"text/event-stream") for k, v in message["headers"]
            )
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True

    async def end_late(self, scope: Scope, limit_s: float) -> None:
        """Answers a request whose time is over."""
        if self._body_complete:
            await self.end(scope, 504, f"not done within {limit_s:g} s", "server_error", "timeout")
        else:
            message = f"body: not received within {limit_s:g} s"
            await self.end(scope, 408, message, "invalid_request_error", "timeout")

    async def end(self, scope: Scope, status: int, message: str, kind: str, code: str | None) -> None:
        """Ends the answer by an error, in whatever form still can be; one that is complete is left alone."""
        with anyio.move_on_after(_LAST_WORD_S):
            if self.status is None:
                await refusal(status, message, kind=kind, code=code)(scope, self._receive, self.send)
            elif self._is_stream and not self._complete:
                last = event(refusal_body(status, message, kind, code))
                await self.send({"type": "http.response.body", "body": last.encode(), "more_body": False})
