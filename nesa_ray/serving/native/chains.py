"""The C++ kernels for what fusion.py finds, callable in a stage's instructions: chains, sums and choices of rows.

Their results are those of the chains, but rounded once where the chain rounds at every operator.  Values of another
dtype than the stage's, as some models have in between, are left to torch.
"""

from __future__ import annotations

import ctypes
import math

import torch

from nesa_ray.serving.fusion import ADD, GATE, NORM, ROTATION, TAKE
from nesa_ray.serving.native.kernel import INTEGER, POINTER, Kernel, empty


class _Norm(ctypes.Structure):
    _fields_ = (
        *((n, POINTER) for n in ("x", "weight", "out")),
        *((n, INTEGER) for n in ("outer", "outer_stride", "inner", "inner_stride", "width")),
        ("epsilon", ctypes.c_double),
    )


class _Rotation(ctypes.Structure):
    _fields_ = (
        *((n, POINTER) for n in ("x", "cosine", "sine", "out")),
        *((n, INTEGER) for n in ("heads", "head_stride", "tokens", "token_stride", "width")),
        *((n, INTEGER) for n in ("cosine_stride", "sine_stride")),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        *((n, POINTER) for n in ("a", "b", "out")),
        *((n, INTEGER) for n in ("rows", "a_stride", "b_stride", "width")),
    )


class _Add(ctypes.Structure):
    _fields_ = (*((n, POINTER) for n in ("a", "b", "out")), ("count", INTEGER))


class _Take(ctypes.Structure):
    _fields_ = (
        *((n, POINTER) for n in ("x", "index", "out")),
        *((n, INTEGER) for n in ("rows", "count", "bytes")),
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As [outer, inner, width] with an innermost stride of 1."""
    x = x[0] if x.dim() == 4 else x if x.dim() == 3 else x[None] if x.dim() == 2 else x.flatten(0, -3)
    return x if x.stride(-1) == 1 else x.contiguous()


class Norm:
    """x / sqrt(mean(x²) + epsilon) · weight over the last dimension; x is [1, T, D], [T, D] or [1, ·, ·, D]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._a, self._dtype = _Norm(), dtype
        self._kernel = Kernel("norm", dtype, self._a)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
        """The normalised x, dense."""
        if x.dtype != self._dtype:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            return wide.to(self._dtype) if weight is None else weight * wide.to(weight.dtype)
        a, rows = self._a, _rows(x)
        out = empty(x, *x.shape)
        a.x, a.out, a.epsilon = rows.data_ptr(), out.data_ptr(), epsilon
        a.weight = weight.data_ptr() if weight is not None else None
        a.outer, a.inner, a.width = rows.shape
        a.outer_stride, a.inner_stride, _ = rows.stride()
        self._kernel()
        return out


class Rotation:
    """x · cosine + [-x₂, x₁] · sine (rotary positions, arXiv 2104.09864).

    x is [1, H, T, D], cosine and sine [1, 1, T, D].
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._a, self._dtype = _Rotation(), dtype
        self._kernel = Kernel("rotate", dtype, self._a)

    def __call__(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """The rotated x, dense."""
        if not x.dtype == cosine.dtype == sine.dtype == self._dtype:
            low, high = x.chunk(2, -1)
            return x * cosine + torch.cat((-high, low), -1) * sine
        a, rows = self._a, _rows(x)
        out = empty(x, *x.shape)
        a.x, a.cosine, a.sine, a.out = rows.data_ptr(), cosine.data_ptr(), sine.data_ptr(), out.data_ptr()
        a.heads, a.tokens, a.width = rows.shape
        a.head_stride, a.token_stride, _ = rows.stride()
        a.cosine_stride, a.sine_stride = cosine.stride(-2), sine.stride(-2)
        self._kernel()
        return out


class Gate:
    """silu(a) · b, both [1, T, I] or [T, I]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._a, self._dtype = _Gate(), dtype
        self._kernel = Kernel("gate", dtype, self._a)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The product, dense."""
        if not a.dtype == b.dtype == self._dtype:
            return torch.nn.functional.silu(a) * b
        rows_a, rows_b, g = _rows(a), _rows(b), self._a
        out = empty(a, *a.shape)
        g.a, g.b, g.out = rows_a.data_ptr(), rows_b.data_ptr(), out.data_ptr()
        _, g.rows, g.width = rows_a.shape
        g.a_stride, g.b_stride = rows_a.stride(1), rows_b.stride(1)
        self._kernel()
        return out


class Add:
    """a + b; by the kernel where both are dense and alike."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._a, self._dtype = _Add(), dtype
        self._kernel = Kernel("add", dtype, self._a)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The sum."""
        alike = a.shape == b.shape and a.dtype == b.dtype == self._dtype
        if not (alike and a.is_contiguous() and b.is_contiguous()):
            return a + b
        g, out = self._a, empty(a, *a.shape)
        g.a, g.b, g.out, g.count = a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel()
        self._kernel()
        return out


class Take:
    """x at the places of an index along a dimension: [before.., index.., behind..] of an x [before.., ·, behind..]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._a, self._dtype = _Take(), dtype
        self._kernel = Kernel("take", dtype, self._a)

    def __call__(self, x: torch.Tensor, dimension: int, index: torch.Tensor) -> torch.Tensor:
        """The rows, dense; by the kernel where x is dense and nothing is before the dimension."""
        before, behind = x.shape[:dimension], x.shape[dimension + 1 :]
        shape = (*before, *index.shape, *behind)
        dense = x.is_contiguous() and index.is_contiguous() and math.prod(before) == 1
        if not dense or x.dtype != self._dtype or index.dtype != torch.int64:
            return x.index_select(dimension, index.reshape(-1)).view(shape)
        a, out = self._a, empty(x, *shape)
        a.x, a.index, a.out = x.data_ptr(), index.data_ptr(), out.data_ptr()
        a.rows, a.count, a.bytes = x.shape[dimension], index.numel(), math.prod(behind) * x.itemsize
        self._kernel()
        return out


CHAINS = {NORM: Norm, ROTATION: Rotation, GATE: Gate, ADD: Add, TAKE: Take}
