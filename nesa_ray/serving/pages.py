"""A stage's memory on a CPU: pages that the system makes when they are first written, huge ones where it has any.

Decoding reads every weight for each token.  At each page's end an address is to be looked up, and what the processor
fetches ahead of itself begins anew: with 2 MiB pages in place of 4 KiB, an Intel core under a hypervisor reads packed
weights 1.12 (float32) to 1.16 x (bfloat16) as fast (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections import Counter
from collections.abc import Sequence

import torch

_HUGE = 1 << 21
_LINE = 64


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros.  On a CPU its memory is taken when it is first written: a stage starts without writing it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not n_bytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    return _pages(n_bytes).view(dtype).view(shape)


def settle(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state`, its tensors on a CPU moved side by side, in their order; who shares memory with others stays.

    A tensor is taken out of `state` as it is moved, so that no more than one is held twice.
    """
    owners = Counter(_memory(t) for t in state.values())
    moving = [n for n, t in state.items() if _movable(t) and owners[_memory(t)] == 1]
    pages = _pages(sum(_lines(state[n].nbytes) for n in moving))
    order, begin = list(state), 0
    for name in moving:
        tensor = state.pop(name)
        place = pages[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        state[name] = place.copy_(tensor)
        begin += _lines(tensor.nbytes)
    return {n: state[n] for n in order}


def _pages(n_bytes: int) -> torch.Tensor:
    """So many bytes, zeros, from the beginning of a huge page on."""
    if not n_bytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, n_bytes + _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % _HUGE
    return torch.frombuffer(pages, dtype=torch.uint8, count=n_bytes, offset=begin)


def _lines(n_bytes: int) -> int:
    """Filled up to whole cache lines."""
    return -(-n_bytes // _LINE) * _LINE


def _memory(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr() if _movable(tensor) else id(tensor)


def _movable(tensor: torch.Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and type(tensor) in _PLAIN
    return plain and tensor.is_contiguous() and tensor.nbytes > 0


_PLAIN = (torch.Tensor, torch.nn.Parameter)
