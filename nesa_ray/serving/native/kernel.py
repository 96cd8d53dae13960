"""How the C++ kernels are called, and recordings of their calls (see tape.py)."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nesa_ray.serving.native.build import kernels

DTYPES = (torch.float32, torch.bfloat16)
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


def entry(name: str, dtype: torch.dtype) -> Any:
    """The library's function for this dtype."""
    return getattr(kernels(), f"{name}_{str(dtype).removeprefix('torch.')}")


@dataclass
class Recording:
    """Kernel calls in their order, each with the words of its structure; and the tensors made for their results."""

    calls: list[tuple[Kernel, array[int]]] = field(default_factory=list)
    made: list[torch.Tensor] = field(default_factory=list)


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


class Kernel:
    """A kernel with its arguments, a structure of words of eight bytes: pointers, integers, floating-point numbers.

    step_fields  those of the arguments that are the step's, not the kernel's own
    """

    def __init__(
        self, name: str, dtype: torch.dtype, arguments: ctypes.Structure, step_fields: tuple[str, ...] = ()
    ) -> None:
        self.arguments, self.step_fields = arguments, step_fields
        self._function = entry(name, dtype)
        self._pointer = ctypes.byref(arguments)
        self.address: int = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def __call__(self) -> None:
        """Computes what the arguments say."""
        self._function(self._pointer)
        if _local.recording is not None:
            _local.recording.calls.append((self, array("q", bytes(self.arguments))))


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor for a kernel's result."""
    made = like.new_empty(shape)
    if _local.recording is not None:
        _local.recording.made.append(made)
    return made


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Records this thread's calls."""
    _local.recording = recording = Recording()
    try:
        yield recording
    finally:
        _local.recording = None
