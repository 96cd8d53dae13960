"""Trainer: capture -> plan -> place -> steps -> save.  It decides and reports; the stages do the work (stage.py)."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from nesa_ray.cluster.joining import connect
from nesa_ray.cluster.probe import probe
from nesa_ray.cluster.topology import Link, Topology
from nesa_ray.errors import CheckpointError, Infeasible, InvalidConfig, InvalidPlan, RuntimeFailure
from nesa_ray.fields import is_function
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.cost import shape
from nesa_ray.graph.graph import NodeId
from nesa_ray.graph.inplace import line
from nesa_ray.graph.models import capture_ref, initial_model, read_config
from nesa_ray.graph.split import StageProgram, split, stage_links
from nesa_ray.planning.advice import dont_pipeline, local_steps
from nesa_ray.planning.costing import reduction_factor
from nesa_ray.planning.interleave import interleave, live_microbatches
from nesa_ray.planning.partition import partition, planned_costs
from nesa_ray.planning.plan import Plan, cost_stages
from nesa_ray.planning.schedule import RankOf, Schedule, StageGraph, dry_run, forward_only, make_schedule
from nesa_ray.planning.simulate import Transfer, Transfers, best_schedule, plan_times, plan_transfers, steady_step_s
from nesa_ray.runtime.checkpoint import WHOLE, load_state, replacing, shard_name, tensor_files, write_index
from nesa_ray.runtime.link_codec import AUTO, choose_codec, measured_speeds
from nesa_ray.runtime.message import RAW
from nesa_ray.runtime.pipeline import Pipeline
from nesa_ray.runtime.profile import Seconds, measure_live
from nesa_ray.training.checkpoints import Checkpoints
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.lora import add_adapters, initial_values, write_adapter
from nesa_ray.training.losses import next_token_seconds
from nesa_ray.training.stage import TrainingStage
from nesa_ray.training.watching import Reports, pipeline_efficiency, watching

MOST_SKIPPED = 10  # steps in a row
CALL_S = 5.0
MOST_LOSS_CHANGED, MOST_GRADIENT_CHANGED = 0.01, 0.5  # by codecs, relative
SLOWED = 1.25  # a step this much longer than its computing, shared evenly, is one that links hold up
WORTH_INTERLEAVING = 0.02  # of the step that `auto` has to save by it
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A stage's seconds per micro-batch (forward and backward), predicted by the plan and measured."""

    stage: int
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.  Losses in nats per token; speeds are means over its last steps, without the first.

    efficiency  see watching.pipeline_efficiency
    predicted_step_s  a step's forwards, backwards and messages, simulated before it ran
    advice      says so when the run should rather not be pipelined
    model       the directory that was saved
    """

    steps: int
    loss: float
    held_out_loss: float | None
    tokens_per_s: float
    efficiency: float
    step_s: float
    predicted_step_s: float
    sent_bytes_per_step: float
    stages: tuple[Prediction, ...]
    model: str
    advice: str | None = None


@dataclass(frozen=True)
class _Layout:
    """Stages as they run, by which rank each, and in which order; `predicted_s` is a step's length by simulation."""

    plan: Plan
    programs: tuple[StageProgram, ...]
    links: StageGraph
    rank_of: RankOf
    schedule: Schedule
    predicted_s: float

    @classmethod
    def of(
        cls,
        captured: Captured,
        topology: Topology,
        planned: Topology,
        plan: Plan,
        device_plan: Plan,
        config: TrainConfig,
        live_limit: Mapping[int, int] | None = None,
    ) -> _Layout:
        """Of a plan made for the `planned` topology, or of one that is interleaved on its devices.

        live_limit  most micro-batches whose activations a stage may keep, where the schedule is to be chosen
        """
        programs = split(captured, plan.stage_of)
        links, times = stage_links(programs), plan_times(plan)
        ranks = [s.id for s in device_plan.stages]
        rank_of = {s.id: ranks[i % len(ranks)] for i, s in enumerate(plan.stages)}
        transfers = _transfers(plan, links, topology, planned, config)
        barrier = config.clip_norm is not None
        if config.schedule == "auto":
            schedule = best_schedule(
                links, config.microbatches, times, transfers, live_limit=live_limit, barrier=barrier
            )
        else:
            schedule = make_schedule(config.schedule, links, config.microbatches, times, rank_of=rank_of)
            dry_run(schedule, links)
        predicted_s = steady_step_s(schedule, links, times, transfers, barrier=barrier)
        return cls(plan, programs, links, rank_of, schedule, predicted_s)


def _as_used(topology: Topology, codec: str, microbatches: int) -> Topology:
    """The topology that is planned with: links as steps feel them.

    A link is as fast as the codec makes it for what is raw; its latency, which a step pays once as micro-batches
    follow each other, is shared out among them.
    """
    speed = measured_speeds()[codec] if codec != RAW else None

    def used(link: Link) -> Link:
        through = 4 / max(speed.seconds(1, link), 1e-30) if speed else 0.0
        return Link(max(link.bytes_per_s, through), link.latency_s / microbatches)

    pairs = {ends: used(link) for ends, link in topology.pairs.items()}
    return replace(topology, default=used(topology.default), pairs=pairs)


def _transfers(plan: Plan, links: StageGraph, topology: Topology, planned: Topology, config: TrainConfig) -> Transfers:
    """What goes from stage to stage, in the codecs that the links will get; latency doesn't occupy a link.

    planned  the topology that the plan's times are of
    """
    node = {s.id: topology.device[s.devices[0]].node for s in plan.stages}
    pace_s = max(s.compute_s for s in plan.stages)
    speeds = measured_speeds() if config.encoded else {}
    found = {}
    for (a, b), transfer in plan_transfers(plan, links).items():
        link = topology.link(node[a], node[b])
        used = planned.link(node[a], node[b])
        sending_s = max(0.0, transfer.wire_s - used.latency_s)
        if not sending_s:
            found[a, b] = Transfer(wire_s=0.0, latency_s=link.latency_s)
            continue
        values = int(sending_s * used.bytes_per_s / 4)
        codec = choose_codec(link, values, 4, pace_s, speeds) if config.codec == AUTO else config.codec
        sent_bytes = values * (speeds[codec].sent_bytes if codec in speeds else 4)
        found[a, b] = Transfer(wire_s=sent_bytes / link.bytes_per_s, latency_s=link.latency_s)
    return found


class Trainer:
    """A run on the live Ray cluster, or on one of this machine, started where there is none and none is named.

    `with Trainer(config) as t: t.fit()`; the stages end with the block.

    Making it captures the model, plans (or reads the plan) and starts the stages.  Raises InvalidConfig, InvalidPlan,
    Infeasible and what the pipeline raises, before anything is written.

    device_plan  a stage on each device (or its replicas): the ranks of the schedule
    plan         the stages that run: the same, or with `stages_per_device` several smaller ones on each device
    """

    def __init__(self, config: TrainConfig, *, show_progress: bool = True) -> None:
        self.config, self._show_progress = config, show_progress
        self.model_config = None if is_function(config.model) else read_config(config.model)
        if config.lora and self.model_config is not None and not _has_weights(config.model):
            raise InvalidConfig(f"train: lora: needs a model with weights, there are none in {config.model}")
        self.captured: Captured = capture_ref(
            config.model,
            batch=config.micro_batch_size,
            tokens=config.data.sequence_length,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            prepare=lambda module: add_adapters(module, config.lora) if config.lora else None,
        )
        example = shape(next(n.meta["val"] for n in self.captured.program.nodes if n.op == "placeholder"))
        if example[:2] != (config.micro_batch_size, config.data.sequence_length):
            given = f"micro_batch_size {config.micro_batch_size} × sequence_length {config.data.sequence_length}"
            raise InvalidConfig(f"train: model: its example's token ids are {list(example)}, needs {given}")
        connect(start=True)
        self.topology = Topology.from_json(config.cluster) if config.cluster else probe(devices=self._wanted_devices())
        self._planned_with: dict[str, Any] = {}
        self.advice: str | None = None
        self.device_plan, layout = self._make_plans()
        self.plan, self.rank_of, self.schedule = layout.plan, layout.rank_of, layout.schedule
        self.programs, self.stage_links = layout.programs, layout.links
        self.predicted_step_s = layout.predicted_s
        self._encoding = config.encoded
        self._output = Path(config.output)
        self._output.mkdir(parents=True, exist_ok=True)
        self._checkpoints = Checkpoints(self._output, keep=config.checkpoints)
        resumed = self._checkpoints.latest() if config.resume else None
        self._resumed = (resumed, Checkpoints.read(resumed)) if resumed is not None else None
        self._scratch = Path(tempfile.mkdtemp(prefix="nesa-ray-", dir=self._output))
        try:
            self.pipeline = self._launch()
        except BaseException:
            shutil.rmtree(self._scratch, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else is in it
                self._output.rmdir()
            raise
        self.device_plan.to_json(self._output / "plan.json")

    @property
    def outlook(self) -> str:
        """One line: the schedule, how many micro-batches it keeps under way, and a step's length by simulation."""
        most = max(dry_run(self.schedule, self.stage_links).values())
        return (
            f"schedule: {self.schedule.name}, {most} of {self.schedule.microbatches} micro-batches under way; "
            f"by simulation a step takes {self.predicted_step_s:.3g} s"
        )

    def predict_step_s(self) -> float:
        """Seconds of a step as it runs, simulated with each operator timed anew.  Stages must be idle meanwhile.

        Raises RuntimeFailure if a device is lost.
        """
        seconds, topology = measure_live(
            self.captured, self.topology, "training", tail=self._loss_tail(), remember=False
        )
        costs = self._planned_with | {"seconds": seconds}
        graph = planned_costs(self.captured.graph, topology, "training", stages=len(self.plan.stages), **costs)
        planned = replace(self._planned_for, devices=topology.devices)
        plan = replace(self.plan, stages=cost_stages(graph, planned, self.plan.stages, overlap=True))
        transfers = _transfers(plan, self.stage_links, topology, planned, self.config)
        barrier = self.config.clip_norm is not None
        return steady_step_s(self.schedule, self.stage_links, plan_times(plan), transfers, barrier=barrier)

    def _make_plans(self) -> tuple[Plan, _Layout]:
        """What runs on which devices, and as what stages; settles sync: auto as well."""
        seconds = None
        if self.config.measure and not self.config.plan:
            tail = self._loss_tail()
            seconds, self.topology = measure_live(
                self.captured, self.topology, "training", tail=tail, compare=not self.config.cluster
            )
        if self.config.sync != "auto":
            return self._plan_with(seconds)
        wanted, self.config = self.config, replace(self.config, sync="step")
        plan, layout = self._plan_with(seconds)
        steps = local_steps(
            layout.plan, layout.predicted_s, replicas=wanted.replicas, micro_batches=wanted.microbatches
        )
        if steps is None:
            return plan, layout
        every_step = self.config
        self.config = replace(wanted, sync="local", zero=0, local=replace(wanted.local, steps=steps))
        try:
            return self._plan_with(seconds)
        except Infeasible:  # local steps hold more in memory
            self.config = every_step
            return plan, layout

    def _plan_with(self, seconds: Seconds | None) -> tuple[Plan, _Layout]:
        c = self.config
        costs: dict[str, Any] = {
            "replicas": c.replicas, "zero": c.zero, "micro_batches": c.microbatches, "recompute": bool(c.recompute),
            "seconds": seconds, "mixed_precision": c.precision == "bf16",
            "local_steps": c.local.steps if c.sync == "local" else 1,
            "overlap": True,  # stages send and receive beside their computing (runtime/channel.py)
        }  # fmt: skip
        codecs = ("int8", "int4") if c.codec == AUTO else (c.codec,)
        found: list[tuple[float, Topology, dict[str, Any], Plan, _Layout]] = []
        for codec in codecs:  # of auto: what is best where links take what they give, and where every byte counts
            self._planned_for, mine = _as_used(self.topology, codec, c.microbatches), dict(costs)
            if c.plan:  # its times are of the links as they are
                self._planned_for = self.topology
            plan = self._plan_devices(mine)
            layout = self._layout(plan, self._interleaved(plan, mine), self._live_limit(plan, mine))
            found.append((layout.predicted_s, self._planned_for, mine, plan, layout))
            shared_s = sum(s.compute_s for s in layout.plan.stages) / len(plan.stages) * c.microbatches
            if layout.predicted_s < SLOWED * shared_s:
                break
        _, self._planned_for, costs, plan, layout = min(found, key=lambda f: f[0])
        if self._planned_with:
            self._planned_with = costs
        if c.schedule == "auto" and self._planned_with and c.stages != 1:
            self.advice = dont_pipeline(
                self.captured.graph, self._planned_for, layout.plan, layout.predicted_s, **costs
            )
            if self.advice:
                log.warning(self.advice)
        self.recompute = c.recompute if c.recompute is not None else self._too_full(layout.plan, costs)
        return plan, layout

    def _interleaved(self, plan: Plan, costs: dict[str, Any]) -> Plan | None:
        """Several stages on each device, where they are asked for, or `auto` should look at them."""
        c = self.config
        per_device = c.stages_per_device
        asked = per_device is not None and per_device > 1
        if not asked and (per_device == 1 or c.schedule != "auto" or c.plan or len(plan.stages) == 1):
            return None
        in_flight = live_microbatches(len(plan.stages), c.microbatches)
        costed = planned_costs(self.captured.graph, self.topology, "training", in_flight=in_flight, **costs)
        reduction = reduction_factor(c.zero, c.replicas, c.microbatches, costs["local_steps"])
        try:
            return interleave(plan, costed, self._planned_for, per_device or 2, reduction=reduction)
        except Infeasible:
            if asked:
                raise
            return None

    def _live_limit(self, plan: Plan, costs: dict[str, Any]) -> dict[int, int]:
        """How many micro-batches' activations each stage's device has room for; what was planned with at least."""
        held = []
        for in_flight in (1, 2):
            graph = planned_costs(self.captured.graph, self.topology, "training", in_flight=in_flight, **costs)
            held.append([s.memory_bytes for s in cost_stages(graph, self.topology, plan.stages)])
        planned, most = live_microbatches(len(plan.stages), self.config.microbatches), self.config.microbatches
        limits = {}
        for stage, one, two in zip(plan.stages, *held, strict=True):
            room = min(self.topology.device[d].memory_bytes for d in stage.devices) - one
            limits[stage.id] = most if room >= most * (two - one) else max(planned, 1 + int(room / (two - one)))
        return limits

    def _layout(self, plan: Plan, interleaved: Plan | None, live_limit: Mapping[int, int]) -> _Layout:
        """The stages and the schedule that run: with `auto`, the shorter step by simulation."""
        c = self.config
        if c.schedule == "interleaved":
            assert interleaved is not None
            return _Layout.of(self.captured, self.topology, self._planned_for, interleaved, plan, c)
        layout = _Layout.of(self.captured, self.topology, self._planned_for, plan, plan, c, live_limit)
        if interleaved is not None:
            other = _Layout.of(
                self.captured,
                self.topology,
                self._planned_for,
                interleaved,
                plan,
                replace(c, schedule="interleaved", stages_per_device=2),
            )
            if other.predicted_s < (1 - WORTH_INTERLEAVING) * layout.predicted_s:
                return other
        return layout

    def _loss_tail(self) -> tuple[NodeId, Callable[[str], float]]:
        """The node that makes the logits, and how long their loss takes."""
        name = next(n for n in self.captured.outputs if n)
        logits = next(n.meta["val"] for n in self.captured.program.nodes if n.name == name)
        return self.captured.node_id[name], partial(next_token_seconds, shape(logits), logits.dtype)

    def _too_full(self, plan: Plan, costs: dict[str, Any]) -> tuple[int, ...]:
        """Stages that have to compute again: those on devices that keeping all activations would overfill."""
        if not costs["recompute"]:
            return ()
        keeping = planned_costs(
            self.captured.graph, self.topology, "training", stages=len(plan.stages), **{**costs, "recompute": False}
        )
        held: dict[str, float] = {}
        for s in cost_stages(keeping, self.topology, plan.stages):
            for d in s.devices:
                held[d] = held.get(d, 0.0) + s.memory_bytes
        full = {d for d, used in held.items() if used > self.topology.device[d].memory_bytes}
        return tuple(s.id for s in plan.stages if full & set(s.devices))

    def _wanted_devices(self) -> int | tuple[str, ...]:
        """Of the live cluster: how many, or a plan's."""
        c = self.config
        return Plan.from_json(c.plan).devices if c.plan else (c.stages or 1) * c.replicas

    def _plan_devices(self, costs: dict[str, Any]) -> Plan:
        c = self.config
        if c.plan:
            plan = Plan.from_json(c.plan)
            plan.check(self.captured.graph, self.topology)
            replicas = {len(s.devices) for s in plan.stages}
            if replicas != {c.replicas}:
                raise InvalidPlan(f"plan: needs {c.replicas} devices a stage (replicas), it has {sorted(replicas)}")
            return plan
        self._planned_with = costs
        options: dict[str, Any] = {"mode": "training", "stages": c.stages, "seed": c.seed}
        try:
            return partition(self.captured.graph, self._planned_for, **options, **costs)
        except Infeasible:
            if c.recompute is not None:
                raise
        costs["recompute"] = True
        return partition(self.captured.graph, self._planned_for, **options, **costs)

    def _launch(self) -> Pipeline:
        c = self.config
        text = getattr(self.model_config, "text_config", self.model_config)
        eos = getattr(text, "eos_token_id", None)
        base = self._base_weights()
        weights = self._adapters() if c.lora else base
        on_disk = set(tensor_files(Path(base)))
        constant = {n: t for n, t in self.captured.state.items() if n not in self.captured.trainable}
        buffers = {n: t for n, t in constant.items() if n not in on_disk and not t.is_meta}
        frozen = {n: t.dtype for n, t in constant.items() if c.lora and n not in buffers}
        return Pipeline(
            self.device_plan,
            self.topology,
            TrainingStage,
            lambda stage, replica: {
                "config": c,
                "programs": self.programs,
                "rank_of": self.rank_of,
                "recompute": self.recompute,
                "weights": weights,
                "base": base,
                "frozen": frozen,
                "buffers": buffers,
                "schedule": self.schedule,
                "forwards": forward_only(self.stage_links, c.microbatches, self.rank_of),
                "single": make_schedule(
                    "interleaved" if len(self.plan.stages) > len(self.device_plan.stages) else "gpipe",
                    self.stage_links,
                    1,
                    plan_times(self.plan),
                    rank_of=self.rank_of,
                ),
                "pace_s": max(s.compute_s for s in self.device_plan.stages),
                "resume": self._resumed[1] if self._resumed else None,
                "inputs": [n for n in self.captured.inputs if n],
                "vocab_size": c.vocab_size or int(getattr(text, "vocab_size", 0)),
                "eos_token_id": eos if isinstance(eos, int) else None,
            },
            emulate_links=c.emulate_links,
        )

    def _base_weights(self) -> str:
        """Where the stages read the model: a checkpoint (adapters' have none of it), its directory, or fresh ones."""
        if self._resumed is not None and self.config.lora is None:
            return str(self._resumed[0])
        if _has_weights(self.config.model):
            return self.config.model
        directory = self._scratch / "initial"
        directory.mkdir()
        if self.model_config is None:
            adapters = self.captured.trainable if self.config.lora else ()
            state = {n: t for n, t in self.captured.state.items() if n not in adapters}
            masters = {n: t.float() if n in self.captured.trainable else t for n, t in state.items()}
            save_file({n: t.contiguous() for n, t in masters.items()}, directory / WHOLE)
        else:
            disable_progress_bar()
            initial_model(self.model_config, self.config.seed).save_pretrained(directory)
        return str(directory)

    def _adapters(self) -> str:
        """Where the stages read their adapters: a checkpoint, or new ones by the seed.  Raises CheckpointError."""
        wanted = {n: self.captured.state[n] for n in sorted(self.captured.trainable)}
        if self._resumed is not None:
            resumed = self._resumed[0]
            for n, t in load_state(resumed, wanted).items():
                if t.shape != wanted[n].shape:
                    needed, there = list(wanted[n].shape), list(t.shape)
                    raise CheckpointError(f"{resumed}: {n}: needs the shape {needed} (lora.rank), it has {there}")
            return str(resumed)
        directory = self._scratch / "adapter"
        directory.mkdir()
        save_file(initial_values(wanted, self.config.seed), directory / WHOLE)
        return str(directory)

    def fit(self) -> TrainResult:
        """Runs the steps, evaluates, saves the model; whoever watches (watching.py) is told of each step."""
        c = self.config
        began, evaluation, skipped = time.monotonic(), self._evaluation(), 0
        first = self._resumed[1].step if self._resumed else 0
        if first >= c.steps:
            raise InvalidConfig(f"train: steps: the checkpoint has done {first} already, needs more, got {c.steps}")
        with watching(c, first=first, show_progress=self._show_progress) as run:
            step, taken_s, last = first, math.inf, False
            while not last:
                count = self._steps_at_once(step, first, taken_s, evaluation is not None)
                start = time.monotonic()
                several = self.pipeline.call(
                    "steps", step, [self.learning_rate(c, i) for i in range(step, step + count)],
                    timed=first < step <= first + c.timeline,
                )  # fmt: skip
                done = min(map(len, several.values()))
                taken_s = (time.monotonic() - start) / done
                for i in range(done):
                    reports: Reports = {seat: of[i] for seat, of in several.items()}
                    row = self._row(step, taken_s, reports, done)
                    skipped = 0 if all(r.updated for r in reports.values()) else skipped + 1
                    if skipped:
                        row |= {"skipped": self._overflow(step, row["loss"], skipped, reports), "loss": None}
                    step += 1
                    if i + 1 < done:
                        run.see(row, reports)
                late = c.max_seconds is not None and time.monotonic() - began > c.max_seconds
                last = step == c.steps or late
                if last:
                    self.pipeline.call("settle")
                if evaluation and (last or step % c.eval_every == 0):
                    row["held_out_loss"] = _mean(self.pipeline.call("evaluate", step - 1, evaluation).values())
                if self._encoding and (step == first + 1 or step % c.codec_check_every == 0):
                    row["codecs"] = self._check_codecs(step - 1)
                run.see(row, reports)
                self._checkpoint(step)
        self._commit_checkpoint(wait=True)
        return TrainResult(
            steps=run.steps,
            loss=math.nan if run.last["loss"] is None else run.last["loss"],
            held_out_loss=run.held_out_loss,
            tokens_per_s=run.mean_over_time("tokens_per_s"),
            efficiency=run.mean_over_time("efficiency"),
            step_s=run.mean("step_s"),
            predicted_step_s=self.predicted_step_s,
            sent_bytes_per_step=run.mean("sent_bytes"),
            stages=tuple(
                Prediction(stage=s.id, predicted_s=s.compute_s, measured_s=run.stage_seconds(s.id))
                for s in self.plan.stages
            ),
            model=self.save(),
            advice=self.advice,
        )

    def _steps_at_once(self, step: int, first: int, taken_s: float, evaluated: bool) -> int:
        """How many steps the stages take at one call: about CALL_S, so that the call's way there and back is hidden.

        Not beyond the next evaluation or checkpoint; the first step and those that are timed are by themselves.
        """
        c = self.config
        if step <= first + c.timeline:
            return 1
        codecs = c.codec_check_every if self._encoding else None
        every = [n for n in (c.checkpoint_every, c.eval_every if evaluated else None, codecs) if n]
        until = min(c.steps - step, *(n - step % n for n in every)) if every else c.steps - step
        return max(1, min(until, int(CALL_S / taken_s)))

    def _check_codecs(self, step: int) -> dict[str, float]:
        """What codecs change in a micro-batch's loss and gradients; where it is too much, everything goes raw."""
        checks = self.pipeline.call("check_codecs", step).values()
        loss, raw = (_mean(getattr(c, name) for c in checks) for name in ("loss", "raw_loss"))
        error = max(c.gradient_error for c in checks)
        if not (abs(loss - raw) <= MOST_LOSS_CHANGED * abs(raw) and error <= MOST_GRADIENT_CHANGED):
            self._encoding = False
            self.pipeline.call("encode", False)
            log.warning(
                f"codec: step {step}: a micro-batch's loss is {loss:.4g} with codecs and {raw:.4g} without, its "
                f"gradients differ by {error:.0%}: everything goes raw from now on"
            )
        return {"loss": loss, "raw_loss": raw, "gradient_error": error}

    def _overflow(self, step: int, loss: float, skipped: int, reports: Reports) -> str:
        """Where a loss that isn't finite comes from; raises RuntimeFailure unless such steps are to be skipped."""
        where = "the loss function made it of finite values"
        first = min((r.overflow for r in reports.values() if r.overflow is not None), default=None)
        if first is not None:
            name = first[1].partition(",")[0]
            code = next((line(n) for n in self.captured.program.nodes if n.name == name), "")
            where = f"the first NaN or inf is in stage {first[0]}, {first[1]}{code}"
        if self.config.on_nan == "skip" and skipped < MOST_SKIPPED:
            return where
        self._commit_checkpoint(wait=True)
        row = f" ({skipped} steps in a row)" if self.config.on_nan == "skip" else ""
        raise RuntimeFailure(f"step {step}: the loss is {loss}{row}: {where}; nothing was learnt from it")

    def _checkpoint(self, done: int) -> None:
        """Commits the checkpoint under way if it is written; begins one when it is time."""
        self._commit_checkpoint(wait=False)
        if self.config.checkpoint_every and done % self.config.checkpoint_every == 0:
            self._commit_checkpoint(wait=True)
            self._files = self._checkpoints.begin(done, [s.id for s in self.device_plan.stages])
            states = self.pipeline.call("checkpoint", self._files)
            self._data_state = next(s for s in states.values() if s is not None)

    def _commit_checkpoint(self, *, wait: bool) -> None:
        if self._checkpoints.writing:
            written = self.pipeline.call("written", wait=wait, only=lambda seat: seat[1] == 0)
            if all(names is not None for names in written.values()):
                files = {self._files[s]: names for (s, _), names in written.items()}
                self._checkpoints.commit(files, self._data_state)

    def save(self) -> str:
        """Writes output/adapter if adapters are trained, and output/model if not or if they are to be merged.

        What was there before stays until the new is whole.  Returns the model's directory, else the adapter's.
        """
        if self.config.lora is None:
            return self._save_model("save")
        adapter = self._save_adapter()
        return self._save_model("save_merged", adapter) if self.config.lora.merge else adapter

    def _save_adapter(self) -> str:
        """A directory that peft reads."""
        target, lora = self._output / "adapter", self.config.lora
        assert lora is not None
        base, task = (self.config.model, "CAUSAL_LM") if self.model_config is not None else (None, None)
        with replacing(target) as directory:
            written = self._write("save", directory)
            parts = [directory / f for f, names in written.items() if names]
            write_adapter(directory, parts, lora, base=base, task=task)
        return str(target)

    def _write(self, method: str, directory: Path, *args: Any) -> dict[str, list[str]]:
        """Has each stage write its file there: what tensors are in which."""
        stages = self.device_plan.stages
        files = {s.id: shard_name(i, len(stages)) for i, s in enumerate(stages)}
        written = self.pipeline.call(method, {s: str(directory / f) for s, f in files.items()}, *args)
        return {files[s]: names for (s, replica), names in written.items() if replica == 0}

    def _save_model(self, method: str, *args: Any) -> str:
        """A Hugging Face directory, a file an actor."""
        target = self._output / "model"
        with replacing(target) as directory:
            write_index(directory, self._write(method, directory, *args))
            if self.model_config is not None:
                self.model_config.architectures = self.model_config.architectures or [self._architecture()]
                self.model_config.save_pretrained(directory)
            if self.config.tokenizer:
                for file in Path(self.config.tokenizer).glob("*.json"):
                    shutil.copy(file, directory / file.name)
        return str(target)

    def _architecture(self) -> str:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        return MODEL_FOR_CAUSAL_LM_MAPPING[type(self.model_config)].__name__

    def _evaluation(self) -> Any:
        count = max(info["eval_batches"] for info in self.pipeline.built.values())
        return forward_only(self.stage_links, count, self.rank_of) if count else None

    @staticmethod
    def learning_rate(config: TrainConfig, step: int) -> float:
        """Of that step: a linear warm-up to the peak, then as `lr_schedule` says, down to `final_lr` of it."""
        peak = config.optimizer.lr
        if step < config.warmup_steps:
            return peak * (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return peak * (config.final_lr + (1 - config.final_lr) * left[config.lr_schedule])

    def _row(self, step: int, seconds: float, reports: Reports, steps: int) -> dict[str, Any]:
        """What there is to tell of a step, one of so many, which took so many seconds each."""
        efficiency = pipeline_efficiency(
            self.schedule, self.stage_links, reports, seconds, steps=steps, barrier=self.config.clip_norm is not None
        )
        return {
            "step": step,
            "loss": _mean(r.loss for r in reports.values()),
            "lr": self.learning_rate(self.config, step),
            "tokens_per_s": self.config.tokens_per_step / seconds,
            "step_s": seconds,
            "efficiency": efficiency,
            "sent_bytes": sum(r.sent_bytes for r in reports.values()),
            "raw_bytes": sum(r.raw_bytes for r in reports.values()),
            **({"gradient_norm": _mean(r.gradient_norm for r in reports.values())} if self.config.clip_norm else {}),
            "stages": {
                str(s.id): {
                    "predicted_s": s.compute_s,
                    "compute_s": _mean(r.stage_compute_s.get(s.id) for r in reports.values()),
                    "wait_s": _mean(r.stage_wait_s.get(s.id) for r in reports.values()),
                    "optimizer_s": _mean(r.optimizer_s for r in reports.values() if s.id in r.stage_compute_s),
                }
                for s in self.plan.stages
            },
        }

    def close(self) -> None:
        """Ends the stages and removes what was written for them.  Idempotent."""
        self.pipeline.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def train(config: TrainConfig, *, show_progress: bool = True) -> TrainResult:
    """Runs `config` on the live Ray cluster, or on this machine where there is none; see Trainer."""
    with Trainer(config, show_progress=show_progress) as trainer:
        return trainer.fit()


def _has_weights(model: str) -> bool:
    """Whether it is a directory with weights in it."""
    return any(Path(model).glob("*.safetensors"))


def _mean(values: Any) -> float:
    known: Iterator[float] = (v for v in values if v is not None)
    found = list(known)
    return sum(found) / len(found) if found else math.nan
