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


def likeliest(logits_RV: torch.Tensor) -> torch.Tensor:
    """The first of the largest of each row, int64 [R]; on the CPU."""
    rows, width = logits_RV.shape
    stride, innermost = logits_RV.stride()
    if kernels() is None or logits_RV.dtype not in DTYPES or innermost != 1:
        return logits_RV.max(-1).indices
    out_R = torch.empty(rows, dtype=torch.int64)
    a = _Likeliest(logits=logits_RV.data_ptr(), out=out_R.data_ptr(), rows=rows, stride=stride, width=width)
    Kernel("likeliest", logits_RV.dtype, a)()
    return out_R
