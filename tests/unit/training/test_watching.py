"""Watching a run, without one: what each watcher makes of a step's row and reports."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nesa_ray.errors import InvalidConfig
from nesa_ray.planning.schedule import Action, ActionKind, make_schedule
from nesa_ray.runtime.channel import Kind, MessageTime, Tag
from nesa_ray.runtime.executor import ActionTime
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.stage import StageReport
from nesa_ray.training.timeline import Timeline
from nesa_ray.training.trainer import Trainer
from nesa_ray.training.watching import MetricsFile, ProgressBar, Prometheus, TensorBoard, pipeline_efficiency, watching

CHAIN = {0: {1}, 1: set()}


def config(tmp_path: Path, **settings: object) -> TrainConfig:
    given = {"model": "a.model:function", "vocab_size": 8, "data": {"paths": ["x"], "sequence_length": 4}}
    return TrainConfig.from_dict({**given, "output": str(tmp_path / "run"), **settings})


def report(forward_s: float, backward_s: float, stage: int = 0, **others: object) -> StageReport:
    action_s = {**dict.fromkeys(ActionKind, 0.0), ActionKind.FORWARD: forward_s, ActionKind.BACKWARD: backward_s}
    given = StageReport(
        loss=None, began_s=100.0, action_s={stage: action_s}, stage_wait_s={stage: 0.5}, optimizer_s=0.3,
        reduce=(3.5, 3.8), step_s=4.0, sent_bytes=8, raw_bytes=8,
    )  # fmt: skip
    return replace(given, **others)


def row(step: int, **others: object) -> dict:
    stage = {"predicted_s": 1.0, "compute_s": 2.0, "wait_s": 0.5, "optimizer_s": 0.1}
    return {"step": step, "loss": 3.0, "lr": 0.1, "tokens_per_s": 100.0, "step_s": 2.0, "efficiency": 0.5,
            "sent_bytes": 8, "raw_bytes": 8, "stages": {"0": stage, "1": stage}, **others}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.8, 0.6]), ("cosine", [0.5, 1, 1, 0.85, 0.55])],
)
def test_learning_rates(tmp_path: Path, name: str, expected: list[float]) -> None:
    """Two steps of warm-up, then three of the schedule, to 0.4 at the (never taken) step after the last."""
    c = config(tmp_path, optimizer={"lr": 2.0}, warmup_steps=2, steps=5, final_lr=0.4, lr_schedule=name)
    rates = [Trainer.learning_rate(c, step) / 2.0 for step in range(5)]
    assert rates == pytest.approx(expected)
    assert Trainer.learning_rate(c, 5) == pytest.approx(2.0 if name == "constant" else 0.8)


def test_bad_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match="lr_schedule: needs one of cosine, linear, constant, got 'cos'"):
        config(tmp_path, lr_schedule="cos")
    with pytest.raises(InvalidConfig, match="final_lr: needs a share from 0 to 1"):
        config(tmp_path, final_lr=1.5)
    for name in ("codec", "gradient_codec"):
        with pytest.raises(InvalidConfig, match=f"{name}: needs auto or one of raw, .*, int4, got 'int3'"):
            config(tmp_path, **{name: "int3"})
    with pytest.raises(InvalidConfig, match="emulate_links: needs a cluster"):
        config(tmp_path, emulate_links=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidConfig, match="tensorboard: needs the package tensorboard"):
        config(tmp_path, tensorboard=True)


def test_efficiency_is_the_schedules_length_over_the_steps() -> None:
    """(2 micro-batches + 1) x 3 s; the slower replica's schedule is the step's."""
    reports = {(s, r): report(1.0 + r, 2.0 + 2 * r, s) for s in CHAIN for r in (0, 1)}
    schedule = make_schedule("1f1b", CHAIN, 2)
    one = {seat: r for seat, r in reports.items() if seat[1] == 0}
    for steps in (1, 3):
        for barrier in (False, True):
            following = {"steps": steps, "barrier": barrier}
            assert pipeline_efficiency(schedule, CHAIN, one, 10.0, **following) == pytest.approx(0.9)
            assert pipeline_efficiency(schedule, CHAIN, reports, 20.0, **following) == pytest.approx(0.9)


def test_metrics_file_keeps_the_steps_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first, steps in ((0, (0, 1, 2)), (2, (2, 3))):
        file = MetricsFile(path, first)
        for step in steps:
            file.see(row(step, first=first), {})
        file.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["first"]) for r in rows] == [(0, 0), (1, 0), (2, 2), (3, 2)]


def test_summary_leaves_the_first_step_out(tmp_path: Path) -> None:
    c = config(tmp_path)
    (tmp_path / "run").mkdir()
    with watching(c, first=0, show_progress=False) as run:
        run.see(row(0, step_s=90.0, tokens_per_s=1.0, held_out_loss=4.0), {})
        assert run.mean("step_s") == 90.0
        run.see(row(1, step_s=1.0, tokens_per_s=30.0), {})
        run.see(row(2, step_s=3.0, tokens_per_s=10.0), {})
    assert (run.steps, run.last["step"], run.held_out_loss) == (3, 2, 4.0)
    assert run.mean("step_s") == 2.0
    assert run.mean_over_time("tokens_per_s") == 15.0
    assert run.stage_seconds(1) == 2.0


def test_timeline(tmp_path: Path) -> None:
    f, b = Action(0, ActionKind.FORWARD, 0), Action(0, ActionKind.BACKWARD, 0)
    actions = (ActionTime(f, 1.0, 2.0, 0.25), ActionTime(b, 2.0, 3.5, 1.0))
    messages = (
        MessageTime(Tag(Kind.INPUT, "ids>0", 0), None, 64, 1.0, 1.25),
        MessageTime(Tag(Kind.FORWARD, "h>1", 0), "stage1/0", 128, 1.5, 1.75, wire_bytes=36),
    )
    timeline = Timeline(tmp_path / "timeline.json")
    timeline.see(row(0), {(0, 0): report(1, 1)})  # wasn't timed
    timeline.see(row(7), {(0, 0): report(1, 1, times=actions, messages=messages)})
    timeline.close()
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [(tracks[e["tid"]], e["cat"], e["name"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    assert spans == [
        ("compute", "forward", "0F0 forward", 1.25, 0.75),
        ("compute", "backward", "0B0 backward", 3.0, 0.5),
        ("receive", "receive", "input ids>0[0]", 1.0, 0.25),
        ("send", "send", "forward h>1[0]", 1.5, 0.25),
        ("reduce", "reduce", "reduce", pytest.approx(3.5), pytest.approx(0.3)),
        ("update", "update", "update", pytest.approx(3.8), pytest.approx(0.2)),
    ]
    sent = next(e for e in events if e.get("cat") == "send")
    assert sent["args"] == {"step": 7, "bytes": 128, "wire_bytes": 36, "to": "stage1/0"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["stage 0, replica 0"]


def test_tensorboard_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (0, 1, 2)), (2, (2, 3))):  # resumed from a checkpoint after two steps
        board = TensorBoard(tmp_path, first)
        for step in steps:
            board.see(row(step, loss=float(first)), {})
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "lr", "tokens_per_s", "efficiency", "stages/1/wait_s"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 0.0), (2, 2.0), (3, 2.0)]


def test_prometheus_metrics_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict = {}

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple) -> None:
            self.name, self.keys, self.tags = name, tag_keys, {}

        def set_default_tags(self, tags: dict) -> "Metric":
            self.tags = tags
            return self

        def set(self, value: float | None, tags: dict | None = None) -> None:
            every = {**self.tags, **(tags or {})}
            assert set(every) == set(self.keys)
            if value is not None:
                recorded[self.name, every["run"], every.get("stage")] = value

        def inc(self, value: float = 1.0) -> None:
            key = (self.name, self.tags["run"], None)
            recorded[key] = recorded.get(key, 0) + value

    monkeypatch.setitem(sys.modules, "ray.util.metrics", SimpleNamespace(Counter=Metric, Gauge=Metric))
    metrics = Prometheus("llama", tokens_per_step=16)
    metrics.see(row(0, held_out_loss=5.0, gradient_norm=2.5), {})
    metrics.see(row(1), {})
    for name, value in (("loss", 3.0), ("tokens_per_s", 100.0), ("efficiency", 0.5), ("gradient_norm", 2.5)):
        assert recorded[f"nesa_train_{name}", "llama", None] == value
    assert recorded["nesa_train_held_out_loss", "llama", None] == 5.0
    assert recorded["nesa_train_tokens", "llama", None] == 32
    assert recorded["nesa_train_stage_wait_s", "llama", "1"] == 0.5


def test_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fast as so far, but no longer than max_seconds leave."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("nesa_ray.training.watching.time.monotonic", lambda: clock.now)
    for limit, expected in ((None, 40.0), (25.0, 5.0), (15.0, 0.0)):
        clock.now = 0.0
        bar = ProgressBar(config(tmp_path, steps=12, max_seconds=limit), first=6, show=False)
        clock.now = 20.0
        assert bar._left_s(7) == pytest.approx(expected)
        bar.close()
