"""Matrix products by the C++ kernels, callable in a stage's instructions: with packed weights and with int8 weights.

Packed (see packing.py): panels of 64 outputs that lie one input after the other, as they are read.  A row's result
doesn't depend on the rows beside it, to the bit.

Int8 (see quantised.py): the kernel rounds each row of x to integers of 16 bit, at most max|x| / 65000 off (columns of
outliers aside, which stay as they are), and adds products of integers without error, so here too a row's result doesn't
depend on the others.  An integer is two bytes, so processors that multiply bytes (AVX-512 VNNI) use an int8 weight as
they read it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch

from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.kernel import DTYPES, INTEGER, POINTER, Kernel, empty, entry

_PANEL = 64  # PANEL of kernels.cpp


def packs(dtype: torch.dtype) -> bool:
    """Whether the kernels have packed products of this dtype that are the fastest here."""
    library = kernels()
    return library is not None and dtype in DTYPES and bool(library.packs())


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] as PackedProduct wants it, float32 or bfloat16: [N / 64, K, 64] or [N / 64, K / 2, 64, 2].

    N is filled up with zeros to a multiple of 64, and K of bfloat16 to one of 2, or of 32 for matrix units.
    """
    pair, deep = torch.float32.itemsize // weight.dtype.itemsize, entry("deep", weight.dtype)()
    outputs, inputs = weight.shape
    panels, deeply = -(-outputs // _PANEL), -(-inputs // deep) * deep
    if panels * _PANEL != outputs or deeply != inputs:
        whole = weight.new_zeros(panels * _PANEL, deeply)
        whole[:outputs, :inputs] = weight
        weight = whole
    made = weight.view(panels, _PANEL, deeply // pair, pair).transpose(1, 2)
    return (made if pair > 1 else made[..., 0]).contiguous()


class _PackedProduct(ctypes.Structure):
    """struct PackedProduct of kernels.cpp."""

    _fields_ = (
        *((n, POINTER) for n in ("x", "weight", "bias", "out")),
        *((n, INTEGER) for n in ("rows", "stride", "inputs", "outputs", "threads")),
    )


class PackedProduct:
    """x [..., K] · weight + bias with a packed weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._a = _PackedProduct(threads=torch.get_num_threads())
        self._kernel = Kernel("packed", dtype, self._a)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
        """[..., N], dense; `weight` is `packed`."""
        a, x = self._a, x.contiguous()
        *outer, a.inputs = x.shape
        out = empty(x, *outer, outputs)
        a.x, a.weight, a.out = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        a.bias = bias.data_ptr() if bias is not None else None
        a.rows, a.stride, a.outputs = math.prod(outer), a.inputs, outputs
        self._kernel()
        return out


class _Product(ctypes.Structure):
    """struct Product of kernels.cpp."""

    _fields_ = (
        *((n, POINTER) for n in ("x", "values", "scales", "outliers", "columns", "bias", "out")),
        *((n, INTEGER) for n in ("rows", "inputs", "outputs", "outlying", "stride", "threads")),
    )


class Int8Product:
    """quantised.int8_product for x in float32 or bfloat16, on the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._a = _Product(threads=torch.get_num_threads())
        self._kernel = Kernel("product", dtype, self._a)

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
        out = empty(x, *x.shape[:-1], len(values))
        a.x, a.out, a.values, a.scales = x.data_ptr(), out.data_ptr(), values.data_ptr(), scales.data_ptr()
        a.outliers, a.columns = outliers.data_ptr(), columns.data_ptr()
        a.bias = bias.data_ptr() if bias is not None else None
        a.outputs, a.inputs = values.shape
        a.rows, a.outlying, a.stride = x.numel() // a.inputs, len(columns), outliers.stride(0)
        self._kernel()
        return out


class Grouped:
    """Another product for each group of rows: those before offsets[0] are the first group's.  On any device."""

    def __init__(self, product: Callable[..., torch.Tensor]) -> None:
        self._product = product

    def __call__(self, x: torch.Tensor, offsets: torch.Tensor, outputs: int, *arguments: Any) -> torch.Tensor:
        """x [S, K] -> [S, N], `outputs` is N.  Tensors of the product's arguments have the groups first."""
        out = x.new_zeros(len(x), outputs)
        begin = 0
        for group, end in enumerate(offsets.tolist()):
            if end > begin:
                own = (a[group] if isinstance(a, torch.Tensor) else a for a in arguments)
                out[begin:end] = self._product(x[begin:end], *own)
            begin = end
        return out
