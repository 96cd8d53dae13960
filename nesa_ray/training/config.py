"""TrainConfig: one training run, read from YAML, every field checked before anything starts."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import is_function, read_dataclass, read_yaml
from nesa_ray.planning.schedule import SCHEDULES
from nesa_ray.runtime.link_codec import AUTO
from nesa_ray.runtime.message import CODEC_NAMES
from nesa_ray.runtime.zero import LocalConfig, OptimizerConfig
from nesa_ray.training.data import DataConfig
from nesa_ray.training.lora import LoraConfig

LR_SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    model             a Hugging Face directory (with weights: they are the start) or config.json (fresh weights), or
                      `package.module:function` that returns a module of token ids and its example
    vocab_size        of a model that isn't Hugging Face's
    data              token files to train on: see DataConfig
    held_out          token files to evaluate on; none: no evaluation
    tokenizer         a Hugging Face tokenizer directory, copied beside the saved model
    output            where metrics.jsonl, plan.json and model/ go
    stages, replicas  pipeline stages, and data-parallel replicas of each; stages None: the planner chooses
    stages_per_device with schedule interleaved: instead of one stage, a device (or its replicas) runs so many smaller
                      ones, numbered along the pipeline, which go round the devices; with auto, 1 forbids it
    zero              ZeRO stage over a stage's replicas: 0 to 3
    sync              how replicas keep together: step, in every step; local, now and then (runtime/local_steps.py;
                      needs zero: 0); auto, local where the measured links are too slow
    local             how often, and how: see LocalConfig
    reduce_codec      what gradients are averaged in over replicas: raw, or int8 with error feedback (needs zero: 0)
    schedule          gpipe, 1f1b, zero_bubble, interleaved, or auto: the shortest by simulation, with one stage or two
                      a device
    measure           plan with operators timed on the cluster's devices, instead of with flops and bytes
    recompute         stages that keep only their inputs and compute a micro-batch again for its backward; None: those
                      whose devices' memory asks for it
    precision         fp32, or bf16: computing in bf16 with parameters, gradients and optimizer in fp32
    codec             what activations and their gradients are on the wire between stages: raw, bf16, int8, int8_mixed,
                      int4, or auto, by each link's measured speed: see runtime/codec.py and link_codec.py
    gradient_codec    for gradients alone; None: the same
    codec_check_every steps between two comparisons of a micro-batch with and without codecs, after the first step too:
                      where the loss or the gradients differ too much, everything goes raw from then on, with a warning
    emulate_links     send as slowly as the links in `cluster` are: to see on one machine what a plan would do on others
    micro_batch_size  windows of one micro-batch
    microbatches      micro-batches of one step, in each replica
    steps             optimizer steps
    lora              train adapters on the frozen model, and save them in output/adapter: see LoraConfig
    max_seconds       stop earlier than `steps` when this much time has passed
    on_nan            when a loss isn't finite: stop, or skip the step and go on (MOST_SKIPPED in a row at most)
    clip_norm         largest 2-norm of the gradient over all stages; larger ones are scaled down to it
    warmup_steps      steps in which the learning rate rises to optimizer.lr
    lr_schedule       how it goes on from there to the last step: cosine, linear or constant
    final_lr          share of optimizer.lr that cosine and linear fall to
    eval_every        steps between evaluations; the last step is always followed by one
    eval_windows      held-out windows of an evaluation
    tensorboard       write the metrics to output/tensorboard as well (needs the package tensorboard)
    timeline          steps, after the first, whose every action and message goes into timeline.json, for Perfetto
    checkpoint_every  steps between checkpoints, written in the background; none: no checkpoint
    checkpoints       how many of the newest are kept
    resume            go on from the newest checkpoint in `output`, if there is one
    cluster, plan     a cluster.json, and a plan.json for it; without them the live cluster is probed and planned for
    """

    model: str
    data: DataConfig
    output: str
    held_out: tuple[str, ...] = ()
    tokenizer: str | None = None
    vocab_size: int | None = None
    stages: int | None = None
    stages_per_device: int | None = None
    replicas: int = 1
    zero: int = 2
    sync: str = "step"
    local: LocalConfig = field(default_factory=LocalConfig)
    reduce_codec: str = "raw"
    schedule: str = "auto"
    measure: bool = False
    recompute: tuple[int, ...] | None = None
    precision: str = "fp32"
    codec: str = "raw"
    gradient_codec: str | None = None
    codec_check_every: int = 200
    emulate_links: bool = False
    micro_batch_size: int = 4
    microbatches: int = 4
    steps: int = 100
    max_seconds: float | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    on_nan: str = "stop"
    lora: LoraConfig | None = None
    clip_norm: float | None = None
    warmup_steps: int = 10
    lr_schedule: str = "cosine"
    final_lr: float = 0.1
    eval_every: int = 50
    eval_windows: int = 64
    seed: int = 0
    tensorboard: bool = False
    timeline: int = 0
    checkpoint_every: int | None = None
    checkpoints: int = 2
    resume: bool = False
    cluster: str | None = None
    plan: str | None = None

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        least = {"replicas": 1, "micro_batch_size": 1, "microbatches": 1, "steps": 1, "warmup_steps": 0, "stages": 1,
                 "eval_every": 1, "eval_windows": 1, "checkpoint_every": 1, "checkpoints": 1, "seed": 0,
                 "timeline": 0, "stages_per_device": 1, "codec_check_every": 1}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InvalidConfig(f"train: {name}: needs an integer ≥ {minimum}, got {value}")
        if self.zero not in (0, 1, 2, 3):
            raise InvalidConfig(f"train: zero: needs 0, 1, 2 or 3, got {self.zero}")
        if self.sync not in ("step", "local", "auto"):
            raise InvalidConfig(f"train: sync: needs step, local or auto, got {self.sync!r}")
        if self.reduce_codec not in ("raw", "int8"):
            raise InvalidConfig(f"train: reduce_codec: needs raw or int8, got {self.reduce_codec!r}")
        if self.zero and (self.sync == "local" or self.reduce_codec == "int8"):
            what = "sync: local" if self.sync == "local" else "reduce_codec: int8"
            raise InvalidConfig(f"train: zero: needs 0 with {what}, got {self.zero}")
        if self.schedule not in ("auto", *SCHEDULES):
            raise InvalidConfig(f"train: schedule: needs auto or one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.precision not in ("fp32", "bf16"):
            raise InvalidConfig(f"train: precision: needs fp32 or bf16, got {self.precision!r}")
        for name in ("codec", "gradient_codec"):
            if getattr(self, name) not in (*CODEC_NAMES, AUTO, *([None] if name == "gradient_codec" else ())):
                known = ", ".join(CODEC_NAMES)
                raise InvalidConfig(f"train: {name}: needs {AUTO} or one of {known}, got {getattr(self, name)!r}")
        if self.emulate_links and self.cluster is None:
            raise InvalidConfig("train: emulate_links: needs a cluster (a cluster.json) that says how slow they are")
        if self.on_nan not in ("stop", "skip"):
            raise InvalidConfig(f"train: on_nan: needs stop or skip, got {self.on_nan!r}")
        if self.lr_schedule not in LR_SCHEDULES:
            known = ", ".join(LR_SCHEDULES)
            raise InvalidConfig(f"train: lr_schedule: needs one of {known}, got {self.lr_schedule!r}")
        if not 0 <= self.final_lr <= 1:
            raise InvalidConfig(f"train: final_lr: needs a share from 0 to 1, got {self.final_lr}")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InvalidConfig("train: tensorboard: needs the package tensorboard (pip install tensorboard)")
        several = self.stages_per_device is not None and self.stages_per_device > 1
        if (self.schedule == "interleaved") != several:
            raise InvalidConfig(
                f"train: stages_per_device: needs {'1' if several else '≥ 2'} with schedule {self.schedule}, "
                f"got {self.stages_per_device}"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InvalidConfig(f"train: clip_norm: needs a number > 0, got {self.clip_norm}")
        if is_function(self.model) and self.vocab_size is None:
            raise InvalidConfig(f"train: vocab_size: missing, {self.model} doesn't say how many token ids there are")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise InvalidConfig(f"train: max_seconds: needs a number > 0, got {self.max_seconds}")
        if self.held_out and self.eval_windows < self.micro_batch_size:
            raise InvalidConfig(
                f"train: eval_windows: needs at least one micro-batch of {self.micro_batch_size}, "
                f"got {self.eval_windows}"
            )

    @property
    def encoded(self) -> bool:
        """Whether anything may go other than raw."""
        return {self.codec, self.gradient_codec or self.codec} != {"raw"}

    @property
    def global_batch_size(self) -> int:
        """Windows of one step over all replicas."""
        return self.micro_batch_size * self.microbatches * self.replicas

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over all replicas."""
        return self.global_batch_size * self.data.sequence_length

    @classmethod
    def from_dict(cls, value: Any, *, base: str | Path = ".") -> TrainConfig:
        """Reads a mapping; relative paths are taken from `base`.  Raises InvalidConfig."""
        config = read_dataclass(cls, value, "train")
        return _resolve(config, Path(base))

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads a YAML file and "key=value" or "key.inner=value" overrides; paths are relative to the file."""
        value = read_yaml(path)
        for item in overrides:
            key, equals, text = item.partition("=")
            if not equals or not key:
                raise InvalidConfig(f"--set: needs key=value, got {item!r}")
            *outer, last = key.split(".")
            at = value
            for name in outer:
                at = at.setdefault(name, {})
                if not isinstance(at, dict):
                    raise InvalidConfig(f"--set: {key}: {name} has no fields")
            at[last] = yaml.safe_load(text)
        return cls.from_dict(value, base=Path(path).parent)


def _resolve(config: TrainConfig, base: Path) -> TrainConfig:
    def absolute(path: str | None) -> str | None:
        return None if path is None else str((base / Path(path).expanduser()).resolve())

    return dataclasses.replace(
        config,
        model=config.model if is_function(config.model) else absolute(config.model) or "",
        output=absolute(config.output) or "",
        tokenizer=absolute(config.tokenizer),
        cluster=absolute(config.cluster),
        plan=absolute(config.plan),
        held_out=tuple(str(absolute(p)) for p in config.held_out),
        data=dataclasses.replace(config.data, paths=tuple(str(absolute(p)) for p in config.data.paths)),
    )
