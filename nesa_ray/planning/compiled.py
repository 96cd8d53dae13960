"""numba, as the planner uses it: machine code kept between runs where the disk allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable) -> Any:
    """The function compiled at its first call; cached on disk, or only in memory where nothing can be written."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba: "no locator available": a read-only checkout and no writable home
        return numba.njit(nogil=True, error_model="numpy")(function)
