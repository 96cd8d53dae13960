"""The C++ kernels for chains of small operators, callable in a stage's instructions (see fusion.py).

Their results are those of the chains, but rounded once where the chain rounds at every operator.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from nesa_ray.serving.fusion import GATE, NORM, ROTATION
from nesa_ray.serving.native.build import kernels

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Norm(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("x", "weight", "out")),
        *((n, _INTEGER) for n in ("outer", "outer_stride", "inner", "inner_stride", "width")),
        ("epsilon", ctypes.c_double),
    )


class _Rotation(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("x", "cosine", "sine", "out")),
        *((n, _INTEGER) for n in ("heads", "head_stride", "tokens", "token_stride", "width")),
        *((n, _INTEGER) for n in ("cosine_stride", "sine_stride")),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        *((n, _POINTER) for n in ("a", "b", "out")),
        *((n, _INTEGER) for n in ("rows", "a_stride", "b_stride", "width")),
    )


def _kernel(name: str, dtype: torch.dtype) -> Any:
    return getattr(kernels(), f"{name}_{str(dtype).removeprefix('torch.')}")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As [outer, inner, width] with an innermost stride of 1."""
    x = x[0] if x.dim() == 4 else x if x.dim() == 3 else x[None] if x.dim() == 2 else x.flatten(0, -3)
    return x if x.stride(-1) == 1 else x.contiguous()


class Norm:
    """x / sqrt(mean(x²) + epsilon) · weight over the last dimension; x is [1, T, D], [T, D] or [1, ·, ·, D]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._kernel, self._a = _kernel("norm", dtype), _Norm()
        self._pointer = ctypes.byref(self._a)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
        """The normalised x, dense."""
        a, rows = self._a, _rows(x)
        out = x.new_empty(x.shape)
        a.x, a.out, a.epsilon = rows.data_ptr(), out.data_ptr(), epsilon
        a.weight = weight.data_ptr() if weight is not None else None
        a.outer, a.inner, a.width = rows.shape
        a.outer_stride, a.inner_stride, _ = rows.stride()
        self._kernel(self._pointer)
        return out


class Rotation:
    """x · cosine + [-x₂, x₁] · sine (rotary positions, arXiv 2104.09864).

    x is [1, H, T, D], cosine and sine [1, 1, T, D].
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._kernel, self._a = _kernel("rotate", dtype), _Rotation()
        self._pointer = ctypes.byref(self._a)

    def __call__(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """The rotated x, dense."""
        a, rows = self._a, _rows(x)
        out = x.new_empty(x.shape)
        a.x, a.cosine, a.sine, a.out = rows.data_ptr(), cosine.data_ptr(), sine.data_ptr(), out.data_ptr()
        a.heads, a.tokens, a.width = rows.shape
        a.head_stride, a.token_stride, _ = rows.stride()
        a.cosine_stride, a.sine_stride = cosine.stride(-2), sine.stride(-2)
        self._kernel(self._pointer)
        return out


class Gate:
    """silu(a) · b, both [1, T, I] or [T, I]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._kernel, self._a = _kernel("gate", dtype), _Gate()
        self._pointer = ctypes.byref(self._a)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The product, dense."""
        rows_a, rows_b, g = _rows(a), _rows(b), self._a
        out = a.new_empty(a.shape)
        g.a, g.b, g.out = rows_a.data_ptr(), rows_b.data_ptr(), out.data_ptr()
        _, g.rows, g.width = rows_a.shape
        g.a_stride, g.b_stride = rows_a.stride(1), rows_b.stride(1)
        self._kernel(self._pointer)
        return out


CHAINS = {NORM: Norm, ROTATION: Rotation, GATE: Gate}
