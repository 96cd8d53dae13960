"""A message between stages: its tag, and how it lies on a connection: one typed header, then the payload; no pickle.

Header: magic, kind, codec (of _NUMBERED), dtype (255: no tensor), dimensions, length of the name, index, bytes of
payload; then the dimensions as int64, the name as UTF-8.  A raw payload is the tensor as it lies in memory, row-major;
other codecs' are in codec.py.  All numbers are little-endian.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

RAW = "raw"
CODEC_NAMES = (RAW, "bf16", "int8", "int8_mixed", "int4")  # of floats, for a user to pick
PLANES = "planes"  # of integers
_NUMBERED = (*CODEC_NAMES, PLANES)
_HEADER = struct.Struct("<4sBBBBBqQ")
_MAGIC = b"nsr2"
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
_NO_TENSOR = 255


class Readable(Protocol):
    """A buffered connection, as io.BufferedReader is one."""

    def read(self, size: int, /) -> bytes | None:
        """So many bytes, fewer only at the end, or where they take too long."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fills some of the buffer; how many bytes, 0 at the end."""


class Kind(IntEnum):
    """What a message carries."""

    FORWARD = 1  # a value, from the stage that makes it to one that reads it
    GRADIENT = 2  # the gradient of a value, back to the stage that made it
    INPUT = 3  # a user input or a target, from the stage that loads the data
    WEIGHT = 4  # a tied parameter's value, from its owner, once a step
    WEIGHT_GRADIENT = 5  # a tied parameter's summed gradient, back to its owner
    CONTROL = 6  # anything else the peers agree on

    __hash__ = int.__hash__  # Enum's own is Python


_KINDS = {int(k): k for k in Kind}


class Tag(NamedTuple):
    """What a message is: its kind, the value's name, and the index of its micro-batch or step."""

    kind: Kind
    name: str
    index: int  # type: ignore[assignment]

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.name}[{self.index}]"


@dataclass(slots=True)
class Sent:
    """What became of a message: its payload's bytes on the wire, None until it was encoded."""

    wire_bytes: int | None = None


def check(tag: Tag, tensor: torch.Tensor | None) -> None:
    """Raises ValueError for what a header can't hold."""
    if len(tag.name.encode()) > 255:
        raise ValueError(f"channel: the name of a value has at most 255 bytes, got {len(tag.name.encode())}")
    if tensor is not None and tensor.dtype not in _DTYPES:
        raise ValueError(f"channel: {tag}: a {tensor.dtype} tensor can't be sent")


def header(tag: Tag, tensor: torch.Tensor | None, codec: str, n_bytes: int) -> bytes:
    """The bytes before a payload of `n_bytes`."""
    name, shape = tag.name.encode(), () if tensor is None else tensor.shape
    dtype = _NO_TENSOR if tensor is None else _DTYPES.index(tensor.dtype)
    fixed = (tag.kind, _NUMBERED.index(codec), dtype, len(shape), len(name), tag.index, n_bytes)
    return _HEADER.pack(_MAGIC, *fixed) + struct.pack(f"<{len(shape)}q", *shape) + name


def raw_payload(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory, or that of a copy on the CPU, row-major; flat."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg():
        tensor = tensor.detach().to("cpu").resolve_neg().contiguous()
    memory: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # which it belongs to
    return memoryview(memory)


def read_message(
    file: Readable, decode: Callable[[str, Any, torch.Size, torch.dtype], torch.Tensor]
) -> tuple[Tag, torch.Tensor | None]:
    """The next message of a connection; a raw payload is received straight into its tensor.

    Raises ConnectionError when there is none, ValueError for anything but a message.
    """
    fixed = _HEADER.unpack(read_exactly(file, _HEADER.size))
    magic, kind, codec, dtype, dims, name_length, index, n_bytes = fixed
    if magic != _MAGIC:
        raise ValueError("not a nesa_ray message")
    rest = read_exactly(file, 8 * dims + name_length)
    shape = torch.Size(struct.unpack_from(f"<{dims}q", rest))
    tag = Tag(_KINDS[kind], rest[8 * dims :].decode(), index)
    if dtype == _NO_TENSOR:
        return tag, None
    if codec:
        payload = np.empty(n_bytes, np.uint8)
        _read_into(file, memoryview(payload))
        return tag, decode(_NUMBERED[codec], payload, shape, _DTYPES[dtype])
    if n_bytes != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{tag}: the header says {n_bytes} bytes for shape {tuple(shape)}")
    if not n_bytes:
        return tag, torch.empty(shape, dtype=_DTYPES[dtype])
    room = np.empty(n_bytes, np.uint8)
    _read_into(file, memoryview(room))
    return tag, torch.frombuffer(room, dtype=_DTYPES[dtype]).view(shape)


def read_exactly(file: Readable, n_bytes: int) -> bytes:
    """Raises ConnectionError when fewer come."""
    got = file.read(n_bytes) or b""
    if len(got) < n_bytes:
        raise ConnectionError("the connection was closed")
    return got


def _read_into(file: Readable, view: memoryview) -> None:
    while view.nbytes:
        got = file.readinto(view)
        if not got:
            raise ConnectionError("the connection was closed")
        view = view[got:]
