"""The form of what a model takes and gives, a row at a time: names, dtypes, shapes; and requests checked against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from nesa_ray.errors import InvalidConfig, InvalidInput
from nesa_ray.fields import nearest
from nesa_ray.graph.capture import Captured, packet_name

Array: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = Mapping[str, torch.Tensor]
_KINDS: Mapping[str, tuple[str, str]] = {  # numpy's kind of what is needed -> the kinds that do, their name
    "b": ("b", "true or false"),
    "i": ("iu", "integers"),
    "u": ("iu", "integers"),
    "f": ("iuf", "numbers"),
}


@dataclass(frozen=True)
class Value:
    """One input or output.

    name      as clients know it;  node  its name in the captured program
    shape     of one row
    default   what an input that is left out is filled with; None: it is needed
    below     an integer input is ≥ 0 and below this, as an embedding's rows are looked up by it; None: any
    """

    name: str
    node: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    default: int | None = None
    below: int | None = None

    @property
    def integers(self) -> tuple[int, int]:
        """The least and the greatest that an integer input may be."""
        limits = torch.iinfo(self.dtype)
        return (limits.min, limits.max) if self.below is None else (0, self.below - 1)

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        kind = {"name": self.name, "dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        optional = {} if self.default is None else {"default": self.default}
        return {**kind, **optional, **({} if self.below is None else {"below": self.below})}


@dataclass(frozen=True)
class Form:
    """What a model takes and gives; all of it has `batch` rows when it is computed."""

    batch: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @classmethod
    def of(cls, captured: Captured, defaults: Mapping[str, int]) -> Form:
        """A captured model's.  `defaults` are for inputs that may be left out.

        Raises InvalidConfig where an input or output hasn't a row for each sample.
        """
        nodes = {n.name: n for n in captured.program.nodes}
        below = _lookups(captured)
        inputs = []
        for node in (i for i in captured.inputs if i is not None):
            name, value = str(nodes[node].target), nodes[node].meta["val"]
            row = tuple(value.shape[1:])
            inputs.append(Value(name, node, value.dtype, row, defaults.get(name), below.get(node)))
        first = next((nodes[i.node].meta["val"] for i in inputs), None)
        if first is None or not first.ndim:
            raise InvalidConfig(f"model: {captured.graph.name}: needs an input with a row for each sample")
        batch = int(first.shape[0])
        outputs = []
        for name, node in _names(captured):
            value = nodes[node].meta["val"]
            outputs.append(Value(name, node, value.dtype, tuple(value.shape[1:])))
        for kind, values in (("input", inputs), ("output", outputs)):
            for v in values:
                shape = tuple(nodes[v.node].meta["val"].shape)
                if not shape or shape[0] != batch:
                    raise InvalidConfig(f"model: {kind} {v.name}: needs {batch} rows, one a sample, has {list(shape)}")
                if v.dtype.is_complex:
                    raise InvalidConfig(f"model: {kind} {v.name}: is {v.dtype}, complex numbers aren't served")
        return cls(batch, tuple(inputs), tuple(outputs))

    def check(self, given: Mapping[str, Array], *, finite: bool) -> dict[str, torch.Tensor]:
        """A request's arrays as tensors by input, all with the same number of rows; `finite` refuses NaN and infinity.

        Raises InvalidInput naming the input.
        """
        names = [i.name for i in self.inputs]
        for name in given:
            if name not in names:
                near = nearest(name, names) or f"; they are {', '.join(names)}"
                raise InvalidInput(f"inputs.{name[:100]}: the model has no such input{near}")
        found = {i.name: _tensor(i, given[i.name], finite) for i in self.inputs if i.name in given}
        rows = {n: len(t) for n, t in found.items()}
        for i in self.inputs:
            if i.name not in found and (i.default is None or not rows):
                raise InvalidInput(f"inputs.{i.name}: missing, needs the shape {_shape(i.shape)}")
        count = next(iter(rows.values()))
        for name, n in rows.items():
            if n != count:
                raise InvalidInput(f"inputs.{name}: has {n} rows, {next(iter(rows))} has {count}")
        for i in self.inputs:
            if i.default is not None:
                found.setdefault(i.name, torch.full((count, *i.shape), i.default, dtype=i.dtype))
        return found


def _names(captured: Captured) -> Iterator[tuple[str, str]]:
    """(name, node) of each output tensor: the names are the keys, fields and positions that lead to it."""
    made = [o for o in captured.outputs if isinstance(o, str)]
    marks = {o: torch.empty(0, device="meta") for o in made}
    node = {id(m): o for o, m in marks.items()}
    for path, leaf in _leaves(captured.unflatten(marks)):
        if id(leaf) in node:
            yield ".".join(path) or "output", node[id(leaf)]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif hasattr(value, "_fields"):
        parts = list(zip(value._fields, value, strict=True))
    elif hasattr(value, "__dataclass_fields__"):
        parts = [(f, getattr(value, f)) for f in value.__dataclass_fields__]
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    else:
        yield path, value
        return
    for key, part in parts:
        yield from _leaves(part, (*path, str(key)))


def _lookups(captured: Captured) -> dict[str, int]:
    """Input node -> the fewest rows of an embedding that is looked up by it."""
    found: dict[str, int] = {}
    for n in captured.program.nodes:
        if packet_name(n) == "embedding" and n.args[1].op == "placeholder":
            rows = int(n.args[0].meta["val"].shape[0])
            found[n.args[1].name] = min(rows, found.get(n.args[1].name, rows))
    return found


def _shape(row: Sequence[int]) -> str:
    return f"[{', '.join(['rows', *map(str, row)])}]"


def _tensor(value: Value, array: Array, finite: bool) -> torch.Tensor:
    where = f"inputs.{value.name}"
    if array.ndim and not len(array):
        raise InvalidInput(f"{where}: needs at least one row")
    if array.ndim == 0 or array.shape[1:] != value.shape:
        raise InvalidInput(f"{where}: needs the shape {_shape(value.shape)}, got {list(array.shape)}")
    wanted = torch.float32 if value.dtype is torch.bfloat16 else value.dtype
    dtype = torch.empty(0, dtype=wanted).numpy().dtype
    kinds, named = _KINDS[dtype.kind]
    if array.dtype.kind not in kinds:
        raise InvalidInput(f"{where}: needs {named}, got {array.dtype}")
    if array.dtype.kind in "iu" and not wanted.is_floating_point and array.size:
        least, most = value.integers
        for extreme in (int(array.min()), int(array.max())):
            if not least <= extreme <= most:
                raise InvalidInput(f"{where}: needs integers from {least} to {most}, got {extreme}")
    with np.errstate(over="ignore"):
        made = torch.from_numpy(np.array(array, dtype=dtype, order="C")).to(value.dtype)
    if finite and wanted.is_floating_point and not bool(made.isfinite().all()):
        most_finite = torch.finfo(value.dtype).max
        raise InvalidInput(f"{where}: needs finite numbers, up to {most_finite:.3g} for {value.described()['dtype']}")
    return made


def plain(tensor: torch.Tensor) -> Array:
    """As numpy has it: bfloat16, which it doesn't know, as float32."""
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
