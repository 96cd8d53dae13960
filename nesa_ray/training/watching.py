"""Watching a run: who is told of each step, and what became of all of them.

A step's row is plain data, a line of metrics.jsonl: step, loss, lr, tokens_per_s, efficiency, step_s, sent_bytes
(raw_bytes without codecs), held_out_loss after an evaluation, gradient_norm with clip_norm, and each stage's predicted
and measured seconds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn

from nesa_ray.planning.schedule import Schedule, StageGraph
from nesa_ray.planning.simulate import step_ends_s
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.stage import StageReport
from nesa_ray.training.timeline import Timeline

Row = Mapping[str, Any]
Reports = Mapping[tuple[int, int], StageReport]  # by (stage, replica)
_AVERAGED_STEPS = 1000


class Watcher(Protocol):
    """Is told of each step of a run."""

    def see(self, row: Row, reports: Reports) -> None:
        """One step, after it."""

    def close(self) -> None:
        """The run is over, or has failed."""


@contextlib.contextmanager
def watching(config: TrainConfig, *, first: int, show_progress: bool) -> Iterator[Summary]:
    """Everyone who watches the run that `config` asks for, from step `first` on; tell them through the summary."""
    output, summary = Path(config.output), Summary()
    with contextlib.ExitStack() as stack:

        def add(watcher: Watcher) -> None:
            summary.watchers.append(watcher)
            stack.callback(watcher.close)

        add(MetricsFile(output / "metrics.jsonl", first))
        add(Prometheus(run=output.name, tokens_per_step=config.tokens_per_step))
        if config.tensorboard:
            add(TensorBoard(output / "tensorboard", first))
        if config.timeline:
            add(Timeline(output / "timeline.json"))
        add(ProgressBar(config, first, show=show_progress))
        yield summary


def pipeline_efficiency(
    schedule: Schedule, stages: StageGraph, reports: Reports, step_s: float, *, steps: int, barrier: bool
) -> float:
    """The schedule's length, simulated with each stage's measured pure compute and nothing else, over the step's.

    1 is a step in which messages, the optimizer and the framework cost no time beside the computing.  The schedule's
    own bubble isn't held against it.  Of several replicas, the one with the slowest stage is simulated.

    step_s   of one in the mean of so many `steps`, which followed each other
    barrier  see step_ends_s
    """
    slowest = max(reports, key=lambda seat: reports[seat].compute_s)[1]
    mine = [report for (_, replica), report in reports.items() if replica == slowest]
    times = {stage: t for report in mine for stage, t in report.stage_times.items()}
    return step_ends_s(schedule, stages, times, steps=steps, barrier=barrier)[-1] / steps / step_s


class Summary:
    """Tells the watchers, and keeps the last rows for the run's averages, its first step (warm-up) left out."""

    def __init__(self) -> None:
        self.watchers: list[Watcher] = []
        self.steps = 0
        self.last: Row = {}
        self.held_out_loss: float | None = None
        self._rows: deque[Row] = deque(maxlen=_AVERAGED_STEPS)

    def see(self, row: Row, reports: Reports) -> None:
        """One step."""
        if self.steps == 1:
            self._rows.clear()
        self._rows.append(row)
        self.steps += 1
        self.last, self.held_out_loss = row, row.get("held_out_loss", self.held_out_loss)
        for watcher in self.watchers:
            watcher.see(row, reports)

    def mean(self, name: str) -> float:
        """The rows' mean."""
        return statistics.fmean(row[name] for row in self._rows)

    def mean_over_time(self, name: str) -> float:
        """The mean of a rate or a share: each step counts as long as it took."""
        return sum(row[name] * row["step_s"] for row in self._rows) / sum(row["step_s"] for row in self._rows)

    def stage_seconds(self, stage: int) -> float:
        """A stage's median seconds of compute per micro-batch."""
        return statistics.median(row["stages"][str(stage)]["compute_s"] for row in self._rows)


class MetricsFile:
    """metrics.jsonl, a line a step.  On resuming, the lines of the steps before `first` stay."""

    def __init__(self, path: Path, first: int) -> None:
        kept = []
        if first and path.is_file():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < first]
        self._file = open(path, "w")  # noqa: SIM115 - close() closes it
        self._file.writelines(line + "\n" for line in kept)

    def see(self, row: Row, reports: Reports) -> None:
        """See Watcher."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """See Watcher."""
        self._file.close()


class TensorBoard:
    """Every number of the row as a scalar: `loss`, `stages/0/wait_s`.  On resuming, steps from `first` on go."""

    def __init__(self, directory: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first or None, flush_secs=10)

    def see(self, row: Row, reports: Reports) -> None:
        """See Watcher."""
        for name, value in _numbers(row):
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """See Watcher."""
        self._writer.close()


def _numbers(row: Row, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


class Prometheus:
    """Gauges and counters that Ray's metrics agent exports, named ray_nesa_train_*, each with the tag `run`."""

    GAUGES: Mapping[str, str] = {
        "loss": "training loss, nats per token",
        "held_out_loss": "held-out loss of the last evaluation, nats per token",
        "lr": "learning rate",
        "tokens_per_s": "tokens a second",
        "efficiency": "the schedule's length with the measured compute over the step's",
        "gradient_norm": "2-norm of the gradient over all stages, before it is clipped",
        "step_s": "seconds of a step",
    }
    STAGE_GAUGES: Mapping[str, str] = {
        "compute_s": "seconds of a stage's forward and backward per micro-batch",
        "wait_s": "seconds that a stage waited for messages in a step",
        "optimizer_s": "seconds of a stage's reduction and update in a step",
    }

    def __init__(self, run: str, tokens_per_step: int) -> None:
        from ray.util.metrics import Counter, Gauge

        mine = {"run": run}
        self._tokens_per_step = tokens_per_step
        self._gauges = {
            n: Gauge(f"nesa_train_{n}", about, tag_keys=("run",)).set_default_tags(mine)
            for n, about in self.GAUGES.items()
        }
        self._stage_gauges = {
            n: Gauge(f"nesa_train_stage_{n}", about, tag_keys=("run", "stage")).set_default_tags(mine)
            for n, about in self.STAGE_GAUGES.items()
        }
        self._steps = Counter("nesa_train_steps", "optimizer steps", tag_keys=("run",)).set_default_tags(mine)
        self._tokens = Counter("nesa_train_tokens", "tokens trained on", tag_keys=("run",)).set_default_tags(mine)

    def see(self, row: Row, reports: Reports) -> None:
        """See Watcher."""
        for name, gauge in self._gauges.items():
            if row.get(name) is not None:
                gauge.set(row[name])
        for stage, measured in row["stages"].items():
            for name, gauge in self._stage_gauges.items():
                gauge.set(measured[name], tags={"stage": stage})
        self._steps.inc()
        self._tokens.inc(self._tokens_per_step)

    def close(self) -> None:
        """See Watcher."""


class ProgressBar:
    """On a terminal: loss, tokens/s, pipeline efficiency, and when the run will be over."""

    def __init__(self, config: TrainConfig, first: int, *, show: bool) -> None:
        self._config, self._first, self._began = config, first, time.monotonic()
        self._held_out = ""
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[shown]}"), disable=not show,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=config.steps, completed=first, shown="")
        self._bar.start()

    def see(self, row: Row, reports: Reports) -> None:
        """See Watcher."""
        if "held_out_loss" in row:
            self._held_out = f"held out {row['held_out_loss']:.3f}  "
        left = timedelta(seconds=round(self._left_s(row["step"])))
        loss = "skipped" if row["loss"] is None else f"loss {row['loss']:.3f}"
        shown = f"{loss}  {row['tokens_per_s']:.0f} tokens/s  efficiency {row['efficiency']:.0%}  "
        self._bar.update(self._task, advance=1, shown=f"{shown}{self._held_out}{left}")

    def close(self) -> None:
        """See Watcher."""
        self._bar.stop()

    def _left_s(self, step: int) -> float:
        """Seconds to the last step, as fast as all so far; no more than max_seconds leave."""
        elapsed_s, done, limit_s = time.monotonic() - self._began, step + 1, self._config.max_seconds
        left_s = elapsed_s / (done - self._first) * (self._config.steps - done)
        return left_s if limit_s is None else max(0.0, min(left_s, limit_s - elapsed_s))
