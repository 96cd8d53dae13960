"""What every endpoint's HTTP application has: its edge, its refusals, /health and /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from nesa_ray.errors import NesaError
from nesa_ray.serving.config import EndpointConfig
from nesa_ray.serving.edge import Edge
from nesa_ray.serving.keys import ApiKeys
from nesa_ray.serving.metrics import CONTENT_TYPE
from nesa_ray.serving.refusals import Refusal, refusal, refusal_of
from nesa_ray.serving.running import FAILED, READY, Running


def endpoint(
    running: Callable[[], Running], config: EndpointConfig, keys: ApiKeys, guarded: tuple[str, ...]
) -> FastAPI:
    """An application without routes of its own yet; `running` is called at each request.

    Paths that begin like one of `guarded` need one of the keys, where there are any.
    """
    refusals: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal}, "5XX": {"model": Refusal}}
    app = FastAPI(title="nesa_ray", docs_url=None, redoc_url=None, responses=refusals)

    def answered(route: str, status: int) -> None:
        running().metrics.count("http_requests", route=route, status=str(status))

    app.add_middleware(Edge, config=config, keys=keys, guarded=guarded, answered=answered)
    app.add_exception_handler(NesaError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)

    @app.get("/health")
    async def health() -> Response:
        """Whether it lives, and whether it takes requests: 200 when both."""
        now = running()
        body = {"status": now.state, "live": now.state != FAILED, "ready": now.state == READY}
        try:
            now.check_ready()
        except NesaError as e:
            return refusal(503, str(e), kind="server_error", besides=body)
        return JSONResponse(body)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        now = running()
        await asyncio.to_thread(now.measure)
        return Response(now.metrics.exposition(), media_type=CONTENT_TYPE)

    return app


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, NesaError)
    return refusal_of(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [p for p in first["loc"][1:] if isinstance(p, int) or (p.isidentifier() and p not in ("str", "list"))]
    where = ".".join(map(str, place)) or "body"
    return refusal(400, f"{where}: {first['msg']}")


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = refusal(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response
