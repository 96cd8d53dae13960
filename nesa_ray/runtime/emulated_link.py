"""A link slower than the one there is: what `Link(bytes_per_s, latency_s)` would make of a channel's messages.

Messages take turns at the link's rate, in the order in which they come; each arrives `latency_s` after its last byte
was sent, and the next is being sent meanwhile.  Whoever sends goes on at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from nesa_ray.cluster.topology import Link


class EmulatedLink:
    """One direction of one link.  `put` is called by one thread at a time."""

    def __init__(self, link: Link, name: str) -> None:
        self._link, self._free_s = link, 0.0
        self._queue: queue.SimpleQueue[tuple[float, Callable[[], object]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"link-{name}", daemon=True)
        self._thread.start()

    def put(self, n_bytes: int, deliver: Callable[[], object]) -> None:
        """Calls `deliver`, on the link's thread, when a message of so many bytes that is sent now would arrive."""
        self._free_s = max(self._free_s, time.perf_counter()) + n_bytes / self._link.bytes_per_s
        self._queue.put((self._free_s + self._link.latency_s, deliver))

    def close(self, timeout_s: float) -> None:
        """Waits until all have arrived, but no longer than that."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            due_s, deliver = item
            while (left_s := due_s - time.perf_counter()) > 0:
                time.sleep(left_s)
            deliver()
