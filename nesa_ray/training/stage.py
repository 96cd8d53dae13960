"""TrainingStage: what one actor does in training: forwards and backwards of its stages, its share of the optimizer.

An actor is a rank of the schedule, with one stage or, interleaved, several.  One step of a replica:
  feed     the first stage loads the replica's micro-batches and sends inputs and labels to the stages that read them,
           a step ahead (feeder.py)
  run      the executor follows the schedule; gradients of the micro-batches add up in the step's leaves
  tie      borrowed (tied) weights send their gradient home to the actor that owns them
  reduce   gradients are averaged over the actor's replicas, beside the last backwards (not with local steps)
  update   the (sharded) optimizer steps
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nesa_ray.graph.modes import derive_seed
from nesa_ray.graph.split import StageModule, StageProgram
from nesa_ray.planning.schedule import ActionKind, RankOf, Schedule, StageTimes
from nesa_ray.runtime.channel import Kind, MessageTime, RecordingChannel, Tag
from nesa_ray.runtime.checkpoint import load_state, tensor_files
from nesa_ray.runtime.executor import ActionTime, Executor, Step, overflowed
from nesa_ray.runtime.gradients import GradientCounts, StepGradients
from nesa_ray.runtime.link_codec import LinkCodec
from nesa_ray.runtime.message import raw_payload
from nesa_ray.runtime.precision import working_copies
from nesa_ray.runtime.stage_actor import StageContext, peer_name
from nesa_ray.runtime.weight_gradient import WeightGradients
from nesa_ray.runtime.zero import MOMENTS, make_optimizer
from nesa_ray.training.checkpoints import RunState, moment_name
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.feeder import Feeder
from nesa_ray.training.lora import merged
from nesa_ray.training.losses import next_token


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One actor's account of one step.  `updated` is False where a loss wasn't finite: nothing was learnt then, and
    `overflow` is the first value made here that isn't: (stage, what).

    sent_bytes were on the wire by its end, raw_bytes they would have been without codecs.

    Times in seconds; action_s is per micro-batch, by stage and kind of action; the others are the step's.  optimizer_s
    is what reduction and update took beyond the last backward; reduce is when gradients were averaged over the
    replicas, from the first that was whole.  A timed step has its actions and messages.  Times are since it began.
    """

    loss: float | None
    began_s: float
    action_s: Mapping[int, Mapping[ActionKind, float]]
    stage_wait_s: Mapping[int, float]
    optimizer_s: float
    reduce: tuple[float, float]
    step_s: float
    sent_bytes: int
    raw_bytes: int
    gradient_norm: float | None = None
    updated: bool = True
    overflow: tuple[int, str] | None = None
    times: tuple[ActionTime, ...] = ()
    messages: tuple[MessageTime, ...] = ()

    @property
    def stage_times(self) -> dict[int, StageTimes]:
        """The measured compute, as schedules are simulated with it.  A backward that isn't split is all of one kind."""
        return {
            stage: StageTimes(
                forward_s=of[ActionKind.FORWARD],
                input_backward_s=of[ActionKind.INPUT_BACKWARD] + of[ActionKind.BACKWARD],
                weight_backward_s=of[ActionKind.WEIGHT_BACKWARD],
            )
            for stage, of in self.action_s.items()
        }

    @property
    def stage_compute_s(self) -> dict[int, float]:
        """Forward and backward together, per micro-batch."""
        return {stage: sum(of.values()) for stage, of in self.action_s.items()}

    @property
    def compute_s(self) -> float:
        """Of all the actor's stages."""
        return sum(self.stage_compute_s.values())

    @property
    def wait_s(self) -> float:
        """Of all the actor's stages."""
        return sum(self.stage_wait_s.values())


@dataclass(frozen=True, kw_only=True)
class CodecCheck:
    """One micro-batch through one actor, with codecs and without; losses at the final stage's.

    gradient_error  2-norm of what codecs changed in the gradients, over the gradients' own
    """

    loss: float | None
    raw_loss: float | None
    gradient_error: float


class TrainingStage:
    """A StageActor's worker.

    programs      all stages, in the order of the pipeline
    rank_of       the rank that runs each: an actor's is the stage of its seat
    forwards      a schedule without backwards, to find where a loss that isn't finite comes from
    single        a schedule of one micro-batch, to see what codecs change
    pace_s        seconds that the slowest actor computes per micro-batch, as planned: for the codec `auto`
    weights, base directories that this node can read: what is trained is read from `weights`, and what is frozen, cast
                  to its dtype in `frozen`, from `base`
    """

    def __init__(
        self,
        context: StageContext,
        *,
        config: TrainConfig,
        programs: Sequence[StageProgram],
        rank_of: RankOf,
        recompute: Collection[int],
        weights: str,
        base: str,
        frozen: Mapping[str, torch.dtype],
        buffers: Mapping[str, torch.Tensor],
        schedule: Schedule,
        forwards: Schedule,
        single: Schedule,
        pace_s: float,
        inputs: Sequence[str],
        resume: RunState | None,
        vocab_size: int,
        eos_token_id: int | None,
    ) -> None:
        rank, replica = context.seat.stage, context.seat.replica
        self._config, self._channel, self._programs = config, RecordingChannel(context.channel), tuple(programs)
        mine = [p for p in programs if rank_of[p.id] == rank]
        self._encoder = context.channel.encode_with(
            {
                peer: LinkCodec(
                    activations=config.codec, gradients=config.gradient_codec or config.codec, link=link, pace_s=pace_s
                )
                for peer, link in context.links.items()
            }
        )
        self._ranks = {r: peer_name(r, replica) for r in sorted(set(rank_of.values()))}
        self._rank, self._replica = rank, replica
        self._schedule, self._forwards, self._single = schedule, forwards, single
        # Between two stages of one actor a tied weight is one leaf: only other actors lend and borrow.
        self._borrows = {n: rank_of[s] for p in mine for n, s in p.borrows.items() if rank_of[s] != rank}
        self._lends = {n: sorted({rank_of[s] for s in to} - {rank}) for p in mine for n, to in p.lends.items()}
        if config.replicas > 1:
            _meet(context, config.replicas)
        owned = dict.fromkeys(n for p in mine for n in p.state)
        state = load_state(base, [n for n in owned if n in frozen])
        state = {n: t.to(frozen[n]) for n, t in state.items()}
        state |= load_state(weights, [n for n in owned if n not in frozen and n not in buffers])
        state |= {n: buffers[n] for n in owned if n in buffers}
        first = {n: p.id for p in reversed(programs) for n in p.state}  # a frozen tied weight is in several stages
        saved = [n for n in owned if n not in buffers and rank_of[first[n]] == rank]
        self._saved = tuple(n for n in saved if n not in frozen)
        self._frozen, self._base = tuple(n for n in saved if n in frozen), base
        of_backward = [n for p in reversed(mine) for n in reversed(p.state_in_use)]
        weight_gradients = WeightGradients()
        self._modules = {
            p.id: StageModule(p, state, device=context.device, operators=weight_gradients.operators) for p in mine
        }
        held = {n: t for m in self._modules.values() for n, t in (*m.named_parameters(), *m.named_buffers())}
        trainable = {n: t for n, t in held.items() if isinstance(t, torch.nn.Parameter) and t.requires_grad}
        self._constants = {n: t.detach() for n, t in held.items() if n not in trainable}
        self._optimizer = make_optimizer(
            trainable,
            config.optimizer,
            zero_stage=config.zero,
            replicas=config.replicas,
            reduce_codec=config.reduce_codec,
            local=config.local if config.sync == "local" else None,
        )
        self._local = config.sync == "local"
        self._late = {n for n, to in self._lends.items() if to and n in trainable}
        early = [n for n in dict.fromkeys((*of_backward, *trainable)) if n in trainable and n not in self._late]
        self._order = (*early, *sorted(self._late))
        self._counts = GradientCounts()
        self._losses: queue.SimpleQueue[Mapping[int, torch.Tensor]] = queue.SimpleQueue()
        self._reducer = ThreadPoolExecutor(1, "reduce")
        if resume is not None:
            self._optimizer.load(_read_moments(weights, trainable, self._optimizer.moment_names), resume.step)
        self._writer: threading.Thread | None = None
        self._written: list[str] = []
        final = next(p.id for p in programs if p.results)
        peers = {s: self._ranks[r] for s, r in rank_of.items()}
        self._executor = Executor(
            self._modules, self._channel, peers, final, loss=next_token, targets=["labels"],
            weight_gradients=weight_gradients, recompute=recompute,
        )  # fmt: skip
        self._feeder: Feeder | None = None
        if rank == rank_of[programs[0].id]:
            self._feeder = Feeder(
                config, replica, lambda number, values: self._executor.feed(programs, number, values),
                ids=inputs[0], vocab_size=vocab_size, eos_token_id=eos_token_id,
            )  # fmt: skip
            if resume is not None:
                self._feeder.load_state_dict(resume.data)

    def ready(self) -> dict[str, Any]:
        """What the driver should know once the stage stands."""
        return {
            "eval_batches": self._feeder.eval_batches if self._feeder is not None else 0,
            "parameters": sum(t.numel() for m in self._modules.values() for t in m.parameters()),
        }

    def check_codecs(self, index: int) -> CodecCheck:
        """Forward and backward of the last step's first micro-batch, raw and then encoded; learns nothing."""
        losses: list[float | None] = []
        gradients: list[dict[str, torch.Tensor]] = []
        for on in (False, True):
            self.encode(on)
            if self._feeder is not None:
                self._feeder.again(index, 1)
            with self._optimizer.weights() as leaves:
                borrowed = self._borrow(leaves, index)
                seed = derive_seed(self._config.seed, index, self._replica)
                first = index * self._config.microbatches
                step = self._run(self._single, self._weights(leaves, borrowed), seed=seed, first=first)
                self._return_gradients(leaves, borrowed, index)
                gradients.append({n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None})
            losses.append(_mean_loss(step))
        raw, encoded = gradients
        changed, whole = (
            sum(float(g.double().square().sum()) for g in of)
            for of in ([encoded[n] - g for n, g in raw.items()], raw.values())
        )
        return CodecCheck(raw_loss=losses[0], loss=losses[1], gradient_error=(changed / whole) ** 0.5 if whole else 0.0)

    def encode(self, on: bool) -> None:
        """Whether messages are encoded from now on; if not, they go raw whatever the link's codec."""
        self._encoder.on = on

    def steps(self, first: int, rates: Sequence[float], *, timed: bool = False) -> list[StageReport]:
        """Optimizer steps, one for each learning rate; every actor of the run calls it with the same arguments.

        They end early after a step whose loss isn't finite, for the driver to decide; replicas that train by themselves
        go on.  `timed`: report each action and message.
        """
        reports: list[StageReport] = []
        for index, lr in enumerate(rates, first):
            report = self._step(index, lr, timed=timed)
            reports.append(report if report.updated else replace(report, overflow=self._find_overflow(index)))
            if not (report.updated or self._local):
                break
        return reports

    def _step(self, index: int, lr: float, *, timed: bool) -> StageReport:
        began_s, began = time.time(), time.perf_counter()
        sent_bytes, raw_bytes = self._channel.sent_bytes, self._channel.raw_bytes
        self._channel.clear()
        if self._feeder is not None:
            self._feeder.begin(index)
        with self._optimizer.weights() as leaves:
            borrowed = self._borrow(leaves, index)
            gradients = StepGradients(leaves, self._order, self._counts, self._late)
            try:
                reducing = self._reducer.submit(self._reduce, gradients, index)
                ran = time.perf_counter()
                step = self._run(
                    self._schedule,
                    self._weights(leaves, borrowed),
                    seed=derive_seed(self._config.seed, index, self._replica),
                    first=index * self._config.microbatches,
                    after_forwards=self._feeder.ahead if self._feeder is not None else None,
                    on_losses=self._losses.put,
                )
                self._return_gradients(leaves, borrowed, index)
                gradients.finish()
                update = time.perf_counter()
                squared, reduced = reducing.result()
                finite = squared is not None
                norm = self._update(squared, lr, index)
            except BaseException as e:
                gradients.fail(e)
                self._losses.put({})
                raise
            finally:
                gradients.close()
        ended = time.perf_counter()
        return StageReport(
            loss=_mean_loss(step),
            began_s=began_s,
            action_s={s: self._action_s(step, s) for s in self._modules},
            stage_wait_s={s: sum(t.wait_s for t in step.times if t.action.stage == s) for s in self._modules},
            optimizer_s=ended - update,
            reduce=(reduced[0] - began, reduced[1] - began),
            step_s=ended - began,
            sent_bytes=self._channel.sent_bytes - sent_bytes,
            raw_bytes=self._channel.raw_bytes - raw_bytes,
            gradient_norm=norm,
            updated=finite,
            times=tuple(_shifted(t, ran - began) for t in step.times) if timed else (),
            messages=tuple(_shifted(m, -began) for m in self._channel.messages) if timed else (),
        )

    def _action_s(self, step: Step, stage: int) -> dict[ActionKind, float]:
        mine = [t for t in step.times if t.action.stage == stage]
        return {
            k: sum(t.compute_s for t in mine if t.action.kind is k) / self._schedule.microbatches for k in ActionKind
        }

    def _reduce(self, gradients: StepGradients, index: int) -> tuple[float | None, tuple[float, float]]:
        """Averages the gradients over the replicas; beside the last backwards, on a thread of its own.

        Returns the square of this actor's norm, None where a loss wasn't finite, and when it was done.
        """
        finite = self._all_finite(gradients, index)
        squared = self._optimizer.reduce(gradients, norm=self._config.clip_norm is not None) if finite else None
        ended = time.perf_counter()
        return squared, (gradients.first_s or ended, ended)

    def _all_finite(self, gradients: StepGradients, index: int) -> bool:
        """Whether every replica's losses are: the actor of the final stage knows, and tells the others."""
        if self._executor.final not in self._modules:
            gradients.wait()
            return bool(self._channel.recv(Tag(Kind.CONTROL, "finite", index), 300.0))
        losses = self._losses.get()
        if not losses:
            gradients.wait()  # raises
        finite = torch.stack(list(losses.values())).isfinite().all().to(torch.int32)
        if self._config.replicas > 1 and not self._local:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        for r in self._ranks:
            if r != self._rank:
                self._channel.send(self._ranks[r], Tag(Kind.CONTROL, "finite", index), finite.cpu())
        return bool(finite)

    def _find_overflow(self, index: int) -> tuple[int, str] | None:
        """(stage, what) of the first NaN or +inf that this actor makes of the last step's data."""
        if self._feeder is not None:
            self._feeder.again(index, self._config.microbatches)
        with self._optimizer.weights() as leaves, torch.no_grad():
            borrowed = self._borrow(leaves, index)
            weights = self._weights(leaves, borrowed)
            spoiled = next((n for n, p in {**leaves, **borrowed}.items() if overflowed(p)), None)
            step = self._run(self._forwards, weights, first=index * self._config.microbatches, watch=True)
        if spoiled is not None:
            return min(self._modules), f"parameter {spoiled}"
        first = min(((s, m, name) for (s, m), name in step.overflows.items()), default=None)
        return None if first is None else (first[0], f"{first[2]}, micro-batch {first[1]}")

    def _update(self, squared: float | None, lr: float, index: int) -> float | None:
        """Steps; with clip_norm, gradients are scaled by the norm over all actors, which is returned.

        `squared` is the square of this actor's; None: a loss wasn't finite, nothing is learnt from the step.
        """
        limit = self._config.clip_norm
        if squared is None:
            self._optimizer.skip()
            return None
        if limit is None:
            self._optimizer.update(lr)
            return None
        others = [r for r in self._ranks if r != self._rank]
        mine = torch.tensor(squared, dtype=torch.float64)
        for r in others:
            self._channel.send(self._ranks[r], Tag(Kind.CONTROL, f"norm {self._rank}", index), mine)
        squares = {self._rank: mine}
        for r in others:
            value = self._channel.recv(Tag(Kind.CONTROL, f"norm {r}", index), 300.0)
            assert value is not None
            squares[r] = value
        norm = float(sum(squares[r] for r in sorted(squares))) ** 0.5  # in one order: the same sum at every actor
        self._optimizer.update(lr, min(1.0, limit / (norm + 1e-6)))
        return norm

    def settle(self) -> None:
        """Brings replicas that train by themselves together."""
        self._optimizer.settle()

    def evaluate(self, index: int, schedule: Schedule) -> float | None:
        """Mean held-out loss in nats per token, from the final stage; the same windows each time."""
        if self._feeder is not None:
            self._feeder.held_out()
        with self._optimizer.weights() as leaves, torch.no_grad():
            borrowed = self._borrow(leaves, index)
            return _mean_loss(self._run(schedule, self._weights(leaves, borrowed), first=-schedule.microbatches))

    def save(self, files: Mapping[int, str]) -> list[str]:
        """Writes the actor's tensors to its file (replica 0 does; all take part) and returns their names."""
        with self._optimizer.weights() as leaves:
            if self._replica:
                return []
            every = {**self._constants, **leaves}
            tensors = {n: every[n].detach().to("cpu", copy=True).contiguous() for n in self._saved}
        return _write(tensors, files[self._rank])

    def save_merged(self, files: Mapping[int, str], adapter: str) -> list[str]:
        """The same for what is frozen, as it lies on disk, with a saved adapter's products added."""
        assert self._config.lora is not None
        if self._replica:
            return []
        tensors = merged(load_state(self._base, self._frozen), Path(adapter), self._config.lora)
        return _write(tensors, files[self._rank])

    def frozen_digest(self) -> str:
        """SHA-256 of the bytes of what is frozen here: training leaves it as it is."""
        digest = hashlib.sha256()
        for n in self._frozen:
            digest.update(raw_payload(self._constants[n]))
        return digest.hexdigest()

    def checkpoint(self, files: Mapping[int, str]) -> dict[str, Any] | None:
        """Copies the actor's tensors and moments, and begins to write them (replica 0 does; all take part).

        Returns the data loader's state where it is.
        """
        self.written(wait=True)
        self._optimizer.settle(moments=True)
        with self._optimizer.weights() as leaves:
            every = {**self._constants, **leaves}
            moments = self._optimizer.moments()
            if self._replica == 0:
                tensors = {n: every[n].detach().to("cpu", copy=True).contiguous() for n in self._saved}
                for m, values in moments.items():
                    for n, t in values.items():
                        tensors[moment_name(m, n)] = t.detach().to("cpu", copy=True).contiguous()
                self._written = list(tensors)
                self._writer = threading.Thread(target=_write, args=(tensors, files[self._rank]))
                self._writer.start()
        return self._feeder.state_dict() if self._feeder is not None else None

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

    def _run(self, schedule: Schedule, weights: Mapping[str, torch.Tensor], **options: Any) -> Step:
        of_stages = dict.fromkeys(self._modules, weights)
        return self._executor.run(schedule, self._rank, of_stages, **options)

    def _weights(
        self, leaves: Mapping[str, torch.Tensor], borrowed: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """What the stages compute with: leaves and borrowed weights, or copies of them, and constants."""
        masters = {**leaves, **borrowed}
        if self._config.precision == "bf16":
            return {**self._constants, **working_copies(masters, torch.bfloat16)}
        return {**self._constants, **masters}

    def _borrow(self, leaves: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        for name, readers in self._lends.items():
            for reader in readers:
                self._channel.send(self._ranks[reader], Tag(Kind.WEIGHT, f"{name}>{reader}", index), leaves[name])
        borrowed = {}
        for name in self._borrows:
            value = self._channel.recv(Tag(Kind.WEIGHT, f"{name}>{self._rank}", index), 300.0)
            assert value is not None
            borrowed[name] = value.requires_grad_()
        return borrowed

    def _return_gradients(
        self, leaves: Mapping[str, torch.Tensor], borrowed: Mapping[str, torch.Tensor], index: int
    ) -> None:
        for name, owner in self._borrows.items():
            tag = Tag(Kind.WEIGHT_GRADIENT, f"{name}>{self._rank}", index)
            self._channel.send(self._ranks[owner], tag, borrowed[name].grad)
        for name, readers in self._lends.items():
            for reader in readers:
                gradient = self._channel.recv(Tag(Kind.WEIGHT_GRADIENT, f"{name}>{reader}", index), 300.0)
                if gradient is not None:
                    mine = leaves[name].grad
                    leaves[name].grad = gradient if mine is None else mine + gradient


def _meet(context: StageContext, replicas: int) -> None:
    """Joins the replicas of its stage into torch.distributed's default group: nccl on GPUs, else gloo."""
    assert context.rendezvous is not None
    listener = None if context.listener is None else context.listener.detach()
    host, port = context.rendezvous.host, context.rendezvous.port
    store = dist.TCPStore(
        host, port, replicas, is_master=listener is not None, master_listen_fd=listener, wait_for_workers=False
    )
    backend = "nccl" if context.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=context.seat.replica, world_size=replicas)


def _read_moments(directory: str, names: Collection[str], moments: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Those moments that the checkpoint has: another optimizer may have written it."""
    there = tensor_files(Path(directory))
    wanted = {m: [n for n in names if m in MOMENTS or moment_name(m, n) in there] for m in moments}
    stored = load_state(directory, [moment_name(m, n) for m, of in wanted.items() for n in of])
    return {m: {n: stored[moment_name(m, n)] for n in of} for m, of in wanted.items()}


def _write(tensors: dict[str, torch.Tensor], file: str) -> list[str]:
    """Writes a file, if there is anything to write, and returns the tensors' names."""
    if tensors:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"format": "pt"})
    return list(tensors)


_Time = TypeVar("_Time", ActionTime, MessageTime)


def _shifted(t: _Time, by_s: float) -> _Time:
    return replace(t, start_s=t.start_s + by_s, end_s=t.end_s + by_s)


def _mean_loss(step: Step) -> float | None:
    return float(torch.stack(list(step.losses.values())).mean()) if step.losses else None
