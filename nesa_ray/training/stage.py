"""TrainingStage: what one actor does in training: its stage's forwards and backwards, its share of the optimizer.

One step of a replica, each stage on its own actor:
  feed     the first stage loads the replica's micro-batches and sends inputs and labels to the stages that read them
  run      the executor follows the schedule; gradients of the micro-batches add up in the step's leaves
  tie      borrowed (tied) weights send their gradient home to the stage that owns them
  update   gradients are averaged over the stage's replicas and the (sharded) optimizer steps
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nesa_ray.graph.modes import derive_seed
from nesa_ray.graph.split import StageModule, StageProgram
from nesa_ray.planning.schedule import ActionKind, Schedule
from nesa_ray.runtime.channel import Kind, Tag
from nesa_ray.runtime.checkpoint import load_state
from nesa_ray.runtime.executor import ActionTime, Executor, Step
from nesa_ray.runtime.stage_actor import StageContext, peer_name
from nesa_ray.runtime.weight_gradient import WeightGradients
from nesa_ray.runtime.zero import MOMENTS, make_optimizer
from nesa_ray.training.checkpoints import RunState, moment_name
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.data import PackedWindows, TokenBatch, TrainBatches, held_out_batches
from nesa_ray.training.lora import merged
from nesa_ray.training.losses import next_token


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One actor's account of one step.

    Times in seconds; compute_s is per micro-batch, forward and backward together; action_s is by kind of action, per
    micro-batch; the others are the step's.
    """

    loss: float | None
    began_s: float
    compute_s: float
    action_s: Mapping[ActionKind, float]
    wait_s: float
    optimizer_s: float
    step_s: float
    sent_bytes: int
    gradient_norm: float | None = None
    times: tuple[ActionTime, ...] = ()


class TrainingStage:
    """A StageActor's worker.

    `weights` and `base` are directories that this node can read: what is trained is read from `weights`, and what is
    frozen, cast to its dtype in `frozen`, from `base`.
    """

    def __init__(
        self,
        context: StageContext,
        *,
        rendezvous: tuple[str, int],
        config: TrainConfig,
        programs: Sequence[StageProgram],
        weights: str,
        base: str,
        frozen: Mapping[str, torch.dtype],
        buffers: Mapping[str, torch.Tensor],
        schedule: Schedule,
        inputs: Sequence[str],
        resume: RunState | None,
        vocab_size: int,
        eos_token_id: int | None,
    ) -> None:
        stage, replica = context.seat.stage, context.seat.replica
        self._config, self._channel, self._programs = config, context.channel, tuple(programs)
        self._program = next(p for p in programs if p.id == stage)
        self._peers = {p.id: peer_name(p.id, replica) for p in programs}
        self._replica, self._schedule, self._inputs = replica, schedule, tuple(inputs)
        if config.replicas > 1:
            host, port = rendezvous
            backend = "nccl" if context.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, init_method=f"tcp://{host}:{port}", rank=replica, world_size=config.replicas
            )
        own = self._program.state
        state = load_state(base, [n for n in own if n in frozen])
        state = {n: t.to(frozen[n]) for n, t in state.items()}
        state |= load_state(weights, [n for n in own if n not in frozen and n not in buffers])
        state |= {n: buffers[n] for n in own if n in buffers}
        earlier = {n for p in programs[: self._programs.index(self._program)] for n in p.state}
        self._saved = tuple(n for n in own if n not in frozen and n not in buffers and n not in earlier)
        self._frozen, self._base = tuple(n for n in own if n in frozen and n not in earlier), base
        weight_gradients = WeightGradients()
        self._module = StageModule(self._program, state, device=context.device, operators=weight_gradients.operators)
        self._optimizer = make_optimizer(
            {n: p for n, p in self._module.named_parameters() if p.requires_grad},
            config.optimizer,
            zero_stage=config.zero,
            replicas=config.replicas,
        )
        if resume is not None:
            self._optimizer.load(self._read_moments(weights), resume.step)
        self._writer: threading.Thread | None = None
        self._written: list[str] = []
        self._constants = {n: t for n, t in self._module.state_dict().items() if n not in self._program.trainable}
        final = next(p.id for p in programs if p.results)
        self._executor = Executor(
            {stage: self._module}, context.channel, self._peers, final, loss=next_token, targets=["labels"],
            weight_gradients=weight_gradients, recompute=config.recompute,
        )  # fmt: skip
        self._data: TrainBatches | None = None
        self._held_out: list[dict[str, torch.Tensor]] = []
        if stage == programs[0].id:
            self._open_data(vocab_size, eos_token_id)
            if resume is not None:
                self._data.load_state_dict(resume.data)  # type: ignore[attr-defined]

    def _read_moments(self, directory: str) -> dict[str, dict[str, torch.Tensor]]:
        trainable = [n for n in self._program.state if n in self._program.trainable]
        stored = load_state(directory, [moment_name(m, n) for m in MOMENTS for n in trainable])
        return {m: {n: stored[moment_name(m, n)] for n in trainable} for m in MOMENTS}

    def _open_data(self, vocab_size: int, eos_token_id: int | None) -> None:
        c = self._config
        windows = PackedWindows(c.data, vocab_size=vocab_size, eos_token_id=eos_token_id)
        self._data = TrainBatches(
            windows,
            global_batch_size=c.global_batch_size,
            micro_batch_size=c.micro_batch_size,
            replica=self._replica,
            replicas=c.replicas,
        )
        if c.held_out:
            batches = held_out_batches(
                c.held_out, c.data.sequence_length, batch_size=c.micro_batch_size, max_windows=c.eval_windows,
                vocab_size=vocab_size, eos_token_id=eos_token_id,
            )  # fmt: skip
            self._held_out = [self._values(b) for b in batches]

    def _values(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        """The module's inputs (ids first; positions where it takes them) and the labels, int64 [B, T] each."""
        shape_BT = batch.input_ids_BT.shape
        return {
            "position_ids": torch.arange(shape_BT[1]).expand(shape_BT),
            "labels": torch.from_numpy(batch.labels_BT),
            self._inputs[0]: torch.from_numpy(batch.input_ids_BT),
        }

    def ready(self) -> dict[str, Any]:
        """What the driver should know once the stage stands."""
        return {
            "eval_batches": len(self._held_out),
            "parameters": sum(t.numel() for n, t in self._module.named_parameters()),
        }

    def step(self, index: int, lr: float, *, timed: bool = False) -> StageReport:
        """One optimizer step; every actor of the run calls it with the same arguments.  `timed`: report each action."""
        began_s, began, sent = time.time(), time.perf_counter(), self._channel.sent_bytes
        if self._data is not None:
            for m, batch in enumerate(self._data.next_step()):
                self._executor.feed(self._programs, m, self._values(batch))
        with self._optimizer.weights() as leaves:
            borrowed = self._borrow(leaves, index)
            ran = time.perf_counter()
            step = self._run(
                self._schedule,
                {**self._constants, **leaves, **borrowed},
                seed=derive_seed(self._config.seed, index, self._replica),
            )
            self._return_gradients(leaves, borrowed, index)
            update = time.perf_counter()
            norm = self._update(leaves, lr, index)
        ended = time.perf_counter()
        return StageReport(
            loss=_mean_loss(step),
            began_s=began_s,
            compute_s=sum(t.compute_s for t in step.times) / self._schedule.microbatches,
            action_s={
                k: sum(t.compute_s for t in step.times if t.action.kind is k) / self._schedule.microbatches
                for k in ActionKind
            },
            wait_s=sum(t.wait_s for t in step.times),
            optimizer_s=ended - update,
            step_s=ended - began,
            sent_bytes=self._channel.sent_bytes - sent,
            gradient_norm=norm,
            times=tuple(_shifted(t, ran - began) for t in step.times) if timed else (),
        )

    def _update(self, leaves: Mapping[str, torch.Tensor], lr: float, index: int) -> float | None:
        """Reduces and steps; with clip_norm, gradients are scaled by the norm over all stages, which is returned."""
        limit = self._config.clip_norm
        squared = self._optimizer.reduce(leaves, norm=limit is not None)
        if limit is None:
            self._optimizer.update(lr)
            return None
        others = [s for s in self._peers if s != self._program.id]
        mine = torch.tensor(squared, dtype=torch.float64)
        for s in others:
            self._channel.send(self._peers[s], Tag(Kind.CONTROL, f"norm {self._program.id}", index), mine)
        squares = {self._program.id: mine}
        for s in others:
            value = self._channel.recv(Tag(Kind.CONTROL, f"norm {s}", index), 300.0)
            assert value is not None
            squares[s] = value
        norm = float(sum(squares[s] for s in sorted(squares))) ** 0.5  # in one order: the same sum at every stage
        self._optimizer.update(lr, min(1.0, limit / (norm + 1e-6)))
        return norm

    def evaluate(self, index: int, schedule: Schedule) -> float | None:
        """Mean held-out loss in nats per token, from the final stage; the same windows each time."""
        if self._data is not None:
            for m, values in enumerate(self._held_out):
                self._executor.feed(self._programs, m, values)
        with self._optimizer.weights() as leaves, torch.no_grad():
            borrowed = self._borrow(leaves, index)
            return _mean_loss(self._run(schedule, {**self._constants, **leaves, **borrowed}))

    def save(self, files: Mapping[int, str]) -> list[str]:
        """Writes the stage's tensors to its file (replica 0 does; all take part) and returns their names."""
        with self._optimizer.weights() as leaves:
            if self._replica:
                return []
            every = {**self._constants, **leaves}
            tensors = {n: every[n].detach().to("cpu", copy=True).contiguous() for n in self._saved}
        return _write(tensors, files[self._program.id])

    def save_merged(self, files: Mapping[int, str], adapter: str) -> list[str]:
        """The same for what is frozen, as it lies on disk, with a saved adapter's products added."""
        assert self._config.lora is not None
        if self._replica:
            return []
        tensors = merged(load_state(self._base, self._frozen), Path(adapter), self._config.lora)
        return _write(tensors, files[self._program.id])

    def frozen_digest(self) -> str:
        """SHA-256 of the bytes of what is frozen here: training leaves it as it is."""
        digest = hashlib.sha256()
        for n in self._frozen:
            digest.update(self._constants[n].detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def checkpoint(self, files: Mapping[int, str]) -> dict[str, Any] | None:
        """Copies the stage's tensors and moments, and begins to write them (replica 0 does; all take part).

        Returns the data loader's state where it is.
        """
        self.written(wait=True)
        with self._optimizer.weights() as leaves:
            every = {**self._constants, **leaves}
            moments = self._optimizer.moments()
            if self._replica == 0:
                tensors = {n: every[n].detach().to("cpu", copy=True).contiguous() for n in self._saved}
                for m, values in moments.items():
                    for n, t in values.items():
                        tensors[moment_name(m, n)] = t.detach().to("cpu", copy=True).contiguous()
                self._written = list(tensors)
                self._writer = threading.Thread(target=_write, args=(tensors, files[self._program.id]))
                self._writer.start()
        return self._data.state_dict() if self._data is not None else None

    def written(self, *, wait: bool) -> list[str] | None:
        """Names of the tensors that the last checkpoint wrote; None while it is still being written."""
        if self._writer is not None:
            self._writer.join(None if wait else 0.0)
            if self._writer.is_alive():
                return None
            self._writer = None
        return self._written

    def close(self) -> None:
        """Leaves the stage's replica group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _run(self, schedule: Schedule, weights: Mapping[str, torch.Tensor], seed: int = 0) -> Step:
        stage = self._program.id
        return self._executor.run(schedule.ranks[stage], schedule.microbatches, {stage: weights}, seed=seed)

    def _borrow(self, leaves: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        for name, readers in self._program.lends.items():
            for reader in readers:
                self._channel.send(self._peers[reader], Tag(Kind.WEIGHT, f"{name}>{reader}", index), leaves[name])
        borrowed = {}
        for name in self._program.borrows:
            value = self._channel.recv(Tag(Kind.WEIGHT, f"{name}>{self._program.id}", index), 300.0)
            assert value is not None
            borrowed[name] = value.requires_grad_()
        return borrowed

    def _return_gradients(
        self, leaves: Mapping[str, torch.Tensor], borrowed: Mapping[str, torch.Tensor], index: int
    ) -> None:
        for name, owner in self._program.borrows.items():
            tag = Tag(Kind.WEIGHT_GRADIENT, f"{name}>{self._program.id}", index)
            self._channel.send(self._peers[owner], tag, borrowed[name].grad)
        for name, readers in self._program.lends.items():
            for reader in readers:
                gradient = self._channel.recv(Tag(Kind.WEIGHT_GRADIENT, f"{name}>{reader}", index), 300.0)
                if gradient is not None:
                    mine = leaves[name].grad
                    leaves[name].grad = gradient if mine is None else mine + gradient


def _write(tensors: dict[str, torch.Tensor], file: str) -> list[str]:
    """Writes a file, if there is anything to write, and returns the tensors' names."""
    if tensors:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"format": "pt"})
    return list(tensors)


def _shifted(t: ActionTime, by_s: float) -> ActionTime:
    return replace(t, start_s=t.start_s + by_s, end_s=t.end_s + by_s)


def _mean_loss(step: Step) -> float | None:
    return float(torch.stack(list(step.losses.values())).mean()) if step.losses else None
