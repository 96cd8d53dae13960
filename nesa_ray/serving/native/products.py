"""Products with int8 weights (see quantised.py) by the C++ kernel, callable in a stage's instructions.

The kernel rounds each row of x to integers of 16 bit, at most max|x| / 65000 off (columns of outliers aside, which stay
as they are), and adds products of integers without error: a row's result doesn't depend on the rows beside it.  An
integer is two bytes, so processors that multiply bytes (AVX-512 VNNI) use an int8 weight as they read it.
"""

from __future__ import annotations

import ctypes

import torch

from nesa_ray.serving.native.build import kernels

_ENTRY = {torch.float32: "product_float32", torch.bfloat16: "product_bfloat16"}


class _Product(ctypes.Structure):
    """struct Product of kernels.cpp."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("x", "values", "scales", "outliers", "columns", "bias", "out")),
        *((n, ctypes.c_int64) for n in ("rows", "inputs", "outputs", "outlying", "stride", "threads")),
    )


class Int8Product:
    """quantised.int8_product for x in float32 or bfloat16, on the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._kernel, self._a = getattr(kernels(), _ENTRY[dtype]), _Product(threads=torch.get_num_threads())
        self._pointer = ctypes.byref(self._a)

    def __call__(
        self,
        x: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor,
        outliers: torch.Tensor,
        columns: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [..., K] · weight + bias, [..., N]."""
        a, x = self._a, x.contiguous()
        out = x.new_empty(*x.shape[:-1], len(values))
        a.x, a.out, a.values, a.scales = x.data_ptr(), out.data_ptr(), values.data_ptr(), scales.data_ptr()
        a.outliers, a.columns = outliers.data_ptr(), columns.data_ptr()
        a.bias = bias.data_ptr() if bias is not None else None
        a.outputs, a.inputs = values.shape
        a.rows, a.outlying, a.stride = x.numel() // a.inputs, len(columns), outliers.stride(0)
        self._kernel(self._pointer)
        return out
