"""A file that Perfetto (ui.perfetto.dev) or chrome://tracing opens: what each stage did, and when it waited.

The Trace Event Format: one "process" per stage replica, whose tracks are what it computes, what it waits for, what it
hands to the channel (which sends it beside the computing), and when gradients are reduced and parameters updated; so
the bubble can be seen.  Clocks of different hosts are not aligned further than the hosts are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nesa_ray.runtime.channel import Kind
from nesa_ray.training.stage import StageReport

_KINDS = {"F": "forward", "B": "backward", "I": "input backward", "W": "weight backward"}
_TRACKS = ("compute", "receive", "send", "control", "reduce", "update")


class Timeline:
    """A watcher (see watching.py) of the steps that were timed; `close` writes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: list[dict[str, Any]] = []
        self._origin_s: float | None = None
        self._named: set[int] = set()

    def see(self, row: Mapping[str, Any], reports: Mapping[tuple[int, int], StageReport]) -> None:
        """Adds the reports that tell their actions' times."""
        for (stage, replica), report in reports.items():
            if report.times:
                self._add(row["step"], stage, replica, report)

    def close(self) -> None:
        """Writes the file."""
        self._path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _add(self, step: int, stage: int, replica: int, report: StageReport) -> None:
        process = self._process(stage, replica, report)
        if self._origin_s is None:
            self._origin_s = report.began_s
            self._events.append({"ph": "M", "name": "clock_sync", "args": {"epoch_s": report.began_s}})
        start = report.began_s - self._origin_s

        def span(track: str, kind: str, name: str, start_s: float, end_s: float, **about: Any) -> None:
            self._events.append(
                {"ph": "X", "pid": process, "tid": _TRACKS.index(track), "cat": kind, "name": name,
                 "ts": (start + start_s) * 1e6, "dur": (end_s - start_s) * 1e6, "args": {"step": step, **about}}
            )  # fmt: skip

        for t in report.times:
            kind = _KINDS[t.action.kind.value]
            about = {"stage": t.action.stage, "micro-batch": t.action.microbatch}
            span("compute", kind, f"{t.action} {kind}", t.start_s + t.wait_s, t.end_s, **about)
        for m in report.messages:
            kind = "receive" if m.to is None else "send"
            to = {} if m.to is None else {"to": m.to}
            track = "control" if m.tag.kind is Kind.CONTROL else kind
            wire = {} if m.wire_bytes is None else {"wire_bytes": m.wire_bytes}
            span(track, kind, str(m.tag), m.start_s, m.end_s, bytes=m.n_bytes, **wire, **to)
        last = report.step_s - report.optimizer_s
        span("reduce", "reduce", "reduce", *report.reduce)
        span("update", "update", "update", max(last, report.reduce[1]), report.step_s)

    def _process(self, stage: int, replica: int, report: StageReport) -> int:
        """The number of the process; names it and its tracks the first time."""
        process = stage * 1000 + replica
        if process not in self._named:
            self._named.add(process)
            self._label(process, 0, "process_name", f"stage {', '.join(map(str, report.action_s))}, replica {replica}")
            for track, name in enumerate(_TRACKS):
                self._label(process, track, "thread_name", name)
        return process

    def _label(self, process: int, track: int, what: str, name: str) -> None:
        self._events.append({"ph": "M", "pid": process, "tid": track, "name": what, "args": {"name": name}})
