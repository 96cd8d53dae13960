"""The likeliest token of each row by the C++ kernel: torch takes 21 us for 32000 logits, and for bfloat16 113."""

from __future__ import annotations

import ctypes

import torch

from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.kernel import DTYPES, INTEGER, POINTER, Kernel


class _Likeliest(ctypes.Structure):
    """struct Likeliest of kernels.cpp."""

    _fields_ = (
        *((n, POINTER) for n in ("logits", "out")),
        *((n, INTEGER) for n in ("rows", "stride", "width")),
    )


class Likeliest:
    """The first of the largest of each row of logits [R, V]."""

    def __init__(self) -> None:
        self._a = _Likeliest()
        self._kernels: dict[torch.dtype, Kernel] = {}

    def __call__(self, logits_RV: torch.Tensor) -> list[int]:
        """By the kernel where it can; on the CPU."""
        rows, width = logits_RV.shape
        stride, innermost = logits_RV.stride()
        if kernels() is None or logits_RV.dtype not in DTYPES or innermost != 1:
            return logits_RV.max(-1).indices.tolist()
        out_R = (ctypes.c_int64 * rows)()
        a = self._a
        a.logits, a.out = logits_RV.data_ptr(), ctypes.addressof(out_R)
        a.rows, a.stride, a.width = rows, stride, width
        if logits_RV.dtype not in self._kernels:
            self._kernels[logits_RV.dtype] = Kernel("likeliest", logits_RV.dtype, a)
        self._kernels[logits_RV.dtype]()
        return list(out_R)
