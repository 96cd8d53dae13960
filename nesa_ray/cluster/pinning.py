"""Binding a process to CPU cores, so that it runs at the speed of the device it stands for.  No Ray here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from nesa_ray.errors import InvalidTopology


def pin(cores: Sequence[int], niceness: int = 0) -> None:
    """Binds this process, all its threads and those they start later, to cores; one torch thread per core.

    No cores: only the niceness is set.  niceness is a floor: an unprivileged process can't go below what it has.
    Affinity and niceness belong to a thread on Linux and are inherited from the thread that starts it, so once no
    unpinned thread is left, none can appear.  Raises InvalidTopology for cores that this machine doesn't give us.
    """
    pinned: set[int] = set()
    while new := {int(t.name) for t in Path("/proc/self/task").iterdir()} - pinned:
        for thread in new:
            with contextlib.suppress(ProcessLookupError):
                _pin_thread(thread, cores, niceness)
        pinned |= new
    if not cores:
        return
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(len(cores))
    import torch

    torch.set_num_threads(len(cores))
    with contextlib.suppress(RuntimeError):  # already set, or parallel work has begun: it can be set only once
        torch.set_num_interop_threads(1)


def _pin_thread(thread: int, cores: Sequence[int], niceness: int) -> None:
    if cores:
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:
            return
        except (OSError, ValueError):
            allowed = sorted(os.sched_getaffinity(0))
            raise InvalidTopology(f"cores: needs {list(cores)}, this machine gives {allowed}") from None
    if niceness > os.getpriority(os.PRIO_PROCESS, thread):
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
