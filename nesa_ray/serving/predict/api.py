"""The HTTP application over a Predictor: POST /predict, as JSON or as Arrow; GET /model says of what form, and so does
/openapi.json."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from nesa_ray.serving.config import PredictConfig
from nesa_ray.serving.endpoint import endpoint
from nesa_ray.serving.keys import ApiKeys
from nesa_ray.serving.predict.predictor import Predictor
from nesa_ray.serving.predict.schema import description
from nesa_ray.serving.predict.wire import ARROW, JSON, READERS, WRITERS

GUARDED = ("/predict", "/model", "/openapi.json")  # where keys are needed, if there are any


def application(predictor_of: Callable[[], Predictor], config: PredictConfig, keys: ApiKeys | None = None) -> FastAPI:
    """The routes.  `predictor_of` is called at each request; `keys` are those of `config`, unless read already."""
    keys = keys or ApiKeys.of(config)
    app = endpoint(predictor_of, config, keys, GUARDED)

    def described() -> dict[str, Any]:
        return description(app, predictor_of().form, config.max_waiting, guarded=GUARDED if keys else ())

    app.openapi = functools.cache(described)  # type: ignore[method-assign]

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What goes in and out: the shapes are a row's."""
        form = predictor_of().form
        return {
            "name": config.served_name,
            "batch_size": form.batch,
            "max_rows": config.max_waiting,
            "inputs": [i.described() for i in form.inputs],
            "outputs": [o.described() for o in form.outputs],
        }

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        """The outputs of the body's rows; as Arrow where the request accepts that, else as JSON."""
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind not in READERS:
            raise HTTPException(415, f"Content-Type: needs {JSON} or {ARROW}, got {kind[:100]}")
        answer = ARROW if ARROW in request.headers.get("accept", "").lower() else JSON
        predictor = predictor_of()
        predictor.check_ready()
        # Beside the event loop: large bodies would hold everyone up.
        inputs = await asyncio.to_thread(READERS[kind], predictor.form, await request.body())
        outputs = await predictor.predict(inputs)
        return Response(await asyncio.to_thread(WRITERS[answer], outputs), media_type=answer)

    return app
