"""The OpenAPI description of an endpoint that isn't a decoder's: its own inputs and outputs, by name and shape."""

from __future__ import annotations

from typing import Any

import torch
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from nesa_ray.serving.predict.form import Form, Value
from nesa_ray.serving.predict.wire import ARROW, JSON
from nesa_ray.serving.schema import name_keys

_BYTES = {"type": "string", "format": "binary"}


def description(app: FastAPI, form: Form, most_rows: int, *, guarded: tuple[str, ...]) -> dict[str, Any]:
    """The whole of it; paths that start with one of `guarded` need an API key."""
    made: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    inputs = _object({i.name: _rows(i, most_rows, given=True) for i in form.inputs})
    inputs["required"] = [i.name for i in form.inputs if i.default is None]
    inputs["description"] = "Each input with the same number of rows."
    outputs = _object({o.name: _rows(o, most_rows, given=False) for o in form.outputs})
    predict = made["paths"]["/predict"]["post"]
    predict["requestBody"] = {
        "required": True,
        "content": {JSON: {"schema": _object({"inputs": inputs})}, ARROW: {"schema": _BYTES}},
    }
    predict["responses"]["200"]["content"] = {
        JSON: {"schema": _object({"outputs": outputs})},
        ARROW: {"schema": _BYTES},
    }
    made["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    name_keys(made, guarded)
    return made


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _rows(value: Value, most: int, *, given: bool) -> dict[str, Any]:
    schema = _number(value, given=given)
    for size in reversed(value.shape):
        schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": most}


def _number(value: Value, *, given: bool) -> dict[str, Any]:
    """Of an output also null, for what isn't finite."""
    if value.dtype is torch.bool:
        return {"type": "boolean"}
    if value.dtype.is_floating_point:
        most = float(torch.finfo(value.dtype).max)
        return {"type": "number", "minimum": -most, "maximum": most} if given else {"type": ["number", "null"]}
    least, greatest = value.integers
    return {"type": "integer", "minimum": least, "maximum": greatest} if given else {"type": "integer"}
