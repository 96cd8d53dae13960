"""A file that Perfetto (ui.perfetto.dev) or chrome://tracing opens: what each stage did, and when it waited.

The Trace Event Format: one "process" per stage replica, its actions and its optimizer on one track, its waits on a
second, so that the bubble can be seen.  Clocks of different hosts are not aligned further than the hosts are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nesa_ray.training.stage import StageReport

_NAMES = {"F": "forward", "B": "backward", "I": "input backward", "W": "weight backward"}


class Timeline:
    """Collects the reports of some steps; `write` makes the file."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._origin_s: float | None = None

    def add(self, step: int, stage: int, replica: int, report: StageReport) -> None:
        """One actor's step, which must have been asked for its action times."""
        if self._origin_s is None:
            self._origin_s = report.began_s
            self._events.append({"ph": "M", "name": "clock_sync", "args": {"epoch_s": report.began_s}})
        process = stage * 1000 + replica
        label = {"name": f"stage {', '.join(map(str, report.stage_compute_s))}, replica {replica}"}
        self._events.append({"ph": "M", "pid": process, "name": "process_name", "args": label})
        for track, name in enumerate(("compute", "waits for messages")):
            self._events.append(
                {"ph": "M", "pid": process, "tid": track, "name": "thread_name", "args": {"name": name}}
            )
        start = report.began_s - self._origin_s
        for t in report.times:
            about = {"micro-batch": t.action.microbatch, "step": step}
            name = f"{t.action} {_NAMES[t.action.kind.value]}"
            self._span(process, 0, name, start + t.start_s + t.wait_s, start + t.end_s, about)
            if t.wait_s > 0:
                self._span(process, 1, f"{t.action} waits", start + t.start_s, start + t.start_s + t.wait_s, about)
        end = start + report.step_s
        self._span(process, 0, "reduce and update", end - report.optimizer_s, end, {"step": step})

    def write(self, path: Path) -> None:
        """Writes the file."""
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _span(self, process: int, track: int, name: str, start_s: float, end_s: float, about: dict[str, Any]) -> None:
        self._events.append(
            {"ph": "X", "pid": process, "tid": track, "name": name, "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6,
             "args": about}
        )  # fmt: skip
