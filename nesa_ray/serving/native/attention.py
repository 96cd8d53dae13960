"""PagedAttention through the C++ kernel.  Shapes as in kv_cache.py."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from nesa_ray.serving.kv_cache import HeadShape, PagedAttention, StepContext
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.kernel import DTYPES, INTEGER, POINTER, Kernel, empty
from nesa_ray.serving.step import Step

# Sequences go through the kernel that have at most so many pairs of a token in the step and a position that it sees: 64
# tokens of a prompt of 256, say.  At more torch is faster, where bfloat16 is multiplied in matrix units, but a step is
# one call (segments.py) only where the kernel does all.
FEW = 1 << 14
STEP_FIELDS = ("places", "starts", "lengths", "tables", "chosen", "table_width", "sequences")


class _Arguments(ctypes.Structure):
    """struct Attention of kernels.cpp."""

    _fields_ = (
        *((n, INTEGER) for n in ("heads", "kv_heads", "key_width", "value_width", "block_size", "window")),
        *((n, ctypes.c_double) for n in ("scale", "softcap")),
        *((n, POINTER) for n in ("k_cache", "v_cache")),
        *((n, POINTER) for n in ("places", "starts", "lengths", "tables", "chosen")),
        *((n, INTEGER) for n in ("tokens", "table_width", "sequences", "threads")),
        *((n, POINTER) for n in ("q", "k", "v", "out")),
        *((n, INTEGER) for n in ("q_head", "q_token", "k_head", "k_token", "v_head", "v_token")),
    )


class NativeContext(StepContext):
    """On the CPU; has `fields`, the values of STEP_FIELDS, as well."""

    def _few(self, count: int, length: int) -> bool:
        return count * length <= FEW or count == 1

    def set(self, step: Step) -> None:
        """See StepContext."""
        self._divide(step)
        tensors = (step.places_T, step.starts_N1, step.lengths_N, step.tables_NM, self.few_rows)
        self.fields = (*(t.data_ptr() for t in tensors), step.tables_NM.shape[1], len(self.few))


class NativeAttention(PagedAttention):
    """Writes the cache and attends for sequences with few tokens in one call; long chunks of prompts go to torch."""

    def __init__(
        self, name: str, shape: HeadShape, blocks: int, context: NativeContext, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(name, shape, blocks, context, dtype, device)
        self.context: NativeContext = context
        self._arguments = _Arguments(
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            key_width=shape.key_width,
            value_width=shape.value_width,
            block_size=context.block_size,
            k_cache=self.k_BGDP.data_ptr(),
            v_cache=self.v_BGPE.data_ptr(),
            threads=torch.get_num_threads(),
        )
        self._kernel = Kernel("attention", dtype, self._arguments, STEP_FIELDS)

    def _compute(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        q, k, v = (_with_dense_heads(x) for x in (q, k, v))
        a = self._arguments
        out_THE = empty(q, q.shape[2], q.shape[1], self.shape.value_width)
        a.scale, a.softcap, a.window, a.tokens = scale, softcap, window, q.shape[2]
        for name, value in zip(STEP_FIELDS, self.context.fields, strict=True):
            setattr(a, name, value)
        a.q, a.k, a.v, a.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out_THE.data_ptr()
        _, a.q_head, a.q_token, _ = q.stride()
        _, a.k_head, a.k_token, _ = k.stride()
        _, a.v_head, a.v_token, _ = v.stride()
        self._kernel()
        self._attend_many(out_THE, q, scale, window, softcap)
        return out_THE


def _with_dense_heads(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def bind(name: str, shape: HeadShape, blocks: int, context: StepContext, dtype: torch.dtype, device: Any) -> Any:
    """The attention node's implementation on this device: the kernel where there is one."""
    if isinstance(context, NativeContext):
        return NativeAttention(name, shape, blocks, context, dtype, device)
    return PagedAttention(name, shape, blocks, context, dtype, device)


def context_for(block_size: int, dtype: torch.dtype, device: torch.device) -> StepContext:
    """The stage's StepContext for the implementation that `bind` will choose."""
    if device.type == "cpu" and dtype in DTYPES and kernels() is not None:
        return NativeContext(block_size)
    return StepContext(block_size, device)
