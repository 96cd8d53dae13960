"""Rows on the wire: JSON, or an Arrow IPC stream with a column for each input or output.

JSON has {"inputs": {name: rows}} and {"outputs": {name: rows}}; what isn't finite is null.  In Arrow a row of more than
one number is a fixed-shape tensor; what comes in may be nested lists as well.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nesa_ray.errors import InvalidInput
from nesa_ray.fields import Fields
from nesa_ray.serving.predict.form import Array, Form, Tensors, plain

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"


def read_json(form: Form, body: bytes) -> Tensors:
    """The inputs of a request.  Raises InvalidInput."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise InvalidInput(f"body: isn't JSON: {str(e).splitlines()[0][:200]}") from None
    known = Fields(value, "body", InvalidInput)
    known.only(["inputs"])
    inputs = known.value.get("inputs")
    if not isinstance(inputs, Mapping):
        raise InvalidInput("inputs: needs an object with the rows of each input")
    booleans = "true" in text or "false" in text
    return form.check({n: _array(n, v, booleans) for n, v in inputs.items()}, finite=True)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} isn't a JSON number")


def _array(name: str, rows: Any, booleans: bool) -> Array:
    """`booleans`: whether there may be any among the rows."""
    where = f"inputs.{name[:100]}"
    if not isinstance(rows, list):
        raise InvalidInput(f"{where}: needs a list of rows")
    try:
        made = np.array(rows)
    except (ValueError, OverflowError, RecursionError):
        raise InvalidInput(f"{where}: rows differ in shape, or are nested too deep") from None
    if made.dtype.kind not in "biuf":
        raise InvalidInput(f"{where}: needs numbers within 64 bits, or true and false")
    if booleans and made.dtype.kind != "b" and _has_boolean(rows):  # numpy takes them for 0 and 1
        raise InvalidInput(f"{where}: has true or false among numbers")
    return made


def _has_boolean(rows: Any) -> bool:
    return any(map(_has_boolean, rows)) if isinstance(rows, list) else isinstance(rows, bool)


def write_json(outputs: Tensors) -> bytes:
    """The answer's body."""
    rows = {n: _finite(plain(t)).tolist() for n, t in outputs.items()}
    return json.dumps({"outputs": rows}, allow_nan=False, separators=(",", ":")).encode()


def _finite(array: Array) -> Array:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return array
    return np.where(np.isfinite(array), array, None)


def read_arrow(form: Form, body: bytes) -> Tensors:
    """The inputs of a request.  Raises InvalidInput."""
    try:
        with pa.ipc.open_stream(body) as stream:
            table = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, TypeError) as e:
        raise InvalidInput(f"body: isn't an Arrow IPC stream: {(str(e).splitlines() or [''])[0][:200]}") from None
    if len(set(table.column_names)) < table.num_columns:
        raise InvalidInput("body: has two columns of the same name")
    return form.check({n: _column(n, table.column(n)) for n in table.column_names}, finite=False)


def _column(name: str, column: pa.ChunkedArray) -> Array:
    """[rows, …] of a column of numbers, of lists of them that are equally long, or of fixed-shape tensors."""
    where = f"inputs.{name[:100]}"
    array = column.combine_chunks()
    shape: list[int] = []
    tensor = array.type if isinstance(array.type, pa.FixedShapeTensorType) else None
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    while True:
        shape.append(len(array))
        if array.null_count:
            raise InvalidInput(f"{where}: has nulls, needs a value everywhere")
        if not _is_list(array.type):
            break
        lengths = pc.unique(pc.list_value_length(array)).to_pylist()
        if len(lengths) > 1:
            raise InvalidInput(f"{where}: rows differ in shape")
        array = array.flatten()
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        raise InvalidInput(f"{where}: needs numbers or booleans, got {array.type}")
    flat = array.to_numpy(zero_copy_only=False)
    if tensor is None:
        return flat.reshape(_dimensions(shape))
    made = flat.reshape(shape[0], *tensor.shape)
    if tensor.permutation:  # the logical dimension i is the physical one permutation[i]
        made = made.transpose(0, *(1 + p for p in tensor.permutation))
    return made


def _dimensions(lengths: list[int]) -> list[int]:
    """The size of each dimension, from the number of elements down to each."""
    sizes = [lengths[0]]
    for before, now in itertools.pairwise(lengths):
        sizes.append(now // before if before else 0)
    return sizes


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def write_arrow(outputs: Tensors) -> bytes:
    """The answer's body."""
    columns = {n: _as_column(plain(t)) for n, t in outputs.items()}
    table = pa.table(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def _as_column(array: Array) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    if array.ndim == 1:
        return flat
    row = array.shape[1:]
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(row)))
    if pa.types.is_boolean(flat.type):  # Arrow's tensors are of whole bytes
        return storage if len(row) == 1 else pa.array(array.tolist())
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(flat.type, row), storage)


READERS: Mapping[str, Callable[[Form, bytes], Tensors]] = {JSON: read_json, ARROW: read_arrow}
WRITERS: Mapping[str, Callable[[Tensors], bytes]] = {JSON: write_json, ARROW: write_arrow}
