"""A host's cores, divided among its devices.  No Ray here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

_HOST = Path("/sys/devices/system/cpu")


def part_of(cores: Sequence[int], i: int, n: int) -> tuple[int, ...]:
    """The i-th of n parts, whose sizes differ by one at most; of fewer cores than parts, one that others have too."""
    first, end = i * len(cores) // n, (i + 1) * len(cores) // n
    return tuple(cores[first : max(first + 1, end)])


def as_neighbours(cores: Iterable[int], host: Path = _HOST) -> list[int]:
    """Ordered so that those of one socket follow each other, and in it the two that are threads of one real core.

    Many hosts number the second threads of all cores after the first ones of all: parts in the order of the numbers
    would get a half of every core.  `host` is Linux's description of it; without one, the order is the numbers'.
    """

    def place(core: int) -> tuple[int, int, int]:
        described = host / f"cpu{core}" / "topology"
        try:
            socket, real = (int((described / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            return 0, core, core
        return socket, real, core

    return sorted(cores, key=place)
