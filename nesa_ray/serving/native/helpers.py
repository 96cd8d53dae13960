"""Cores that wait, lent to the kernels of the stage that computes (Crew in kernels.cpp).

While one sequence alone is under way, one stage computes at a time.  Those on the same host then lend it their cores: a
token takes as long as reading the weights, and two cores read faster than one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from nesa_ray.serving.native.build import kernels


class Helpers:
    """Threads of this process on some cores; they take part in all kernels inside of `with`, and sleep otherwise.

    For a process whose own kernels have one thread.  What kernels compute is the same to the bit.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        """The threads stay as long as the process does."""
        self._library = kernels() if cores else None
        if self._library is not None:
            self._library.hire((ctypes.c_int64 * len(cores))(*cores), ctypes.c_int64(len(cores)))

    def __enter__(self) -> None:
        if self._library is not None:
            self._library.begin_help()

    def __exit__(self, *_: object) -> None:
        if self._library is not None:
            self._library.end_help()
