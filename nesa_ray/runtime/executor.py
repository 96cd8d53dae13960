"""Executes one rank's Actions: receive, compute, send.  The same code under Ray actors and in one process.

Gradients accumulate in the stage's weights over the micro-batches of a step; what is done with them then (reduced,
sharded, applied) is the optimizer's business (runtime/zero.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from nesa_ray.errors import NesaError, StageFailed
from nesa_ray.graph.cost import tensors
from nesa_ray.graph.modes import derive_seed
from nesa_ray.graph.split import StageModule, StageProgram
from nesa_ray.planning.schedule import Action, ActionKind, Schedule
from nesa_ray.runtime.channel import Channel, Kind, Tag
from nesa_ray.runtime.weight_gradient import WeightGradients

Values = Mapping[str, torch.Tensor]
# (results of the module by name, targets by name) -> a scalar, the mean loss of one micro-batch.
Loss = Callable[[Values, Values], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ActionTime:
    """When one action ran: seconds since the step began; `wait_s` of it was spent waiting for messages."""

    action: Action
    start_s: float
    end_s: float
    wait_s: float

    @property
    def compute_s(self) -> float:
        """Seconds of work: the action's time less the waiting."""
        return self.end_s - self.start_s - self.wait_s


@dataclass
class Step:
    """What one rank did in one step: losses (at the final stage), results (inference), times.

    overflows  where asked for, by stage and micro-batch: the first value with a NaN or +inf in it (masks hold -inf)
    """

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    results: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    times: list[ActionTime] = field(default_factory=list)
    overflows: dict[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Live:
    """A micro-batch between its forward and its backward; `made` is None where it will be computed again."""

    inputs: Sequence[torch.Tensor]
    received: Mapping[str, torch.Tensor]
    targets: Mapping[str, torch.Tensor]
    made: Mapping[str, torch.Tensor] | None = None
    loss: torch.Tensor | None = None


class Executor:
    """Runs the stages of one rank.

    modules  the stages by id
    peers    for each stage of the plan, its rank's name on the channel
    final    the stage that holds the module's results and computes the loss
    targets  names that `loss` wants besides the results; they arrive as INPUT messages, like the user's inputs
    weight_gradients  what the modules' operators are bound to; without it a split backward does all its work at once
    recompute  stages that keep only a micro-batch's inputs, and compute it again for its backward (Chen et al., arXiv
               1604.06174)
    """

    def __init__(
        self,
        modules: Mapping[int, StageModule],
        channel: Channel,
        peers: Mapping[int, str],
        final: int,
        *,
        loss: Loss | None = None,
        targets: Sequence[str] = (),
        weight_gradients: WeightGradients | None = None,
        recompute: Collection[int] = (),
        timeout_s: float | None = 300.0,
    ) -> None:
        self.modules, self.channel, self.peers, self.final = dict(modules), channel, dict(peers), final
        self.loss, self.targets, self.timeout_s = loss, tuple(targets), timeout_s
        self._weight_gradients, self._recompute = weight_gradients, frozenset(recompute)
        self._watch, self._first = False, 0
        self._live: dict[tuple[int, int], _Live] = {}
        self._deferred: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def run(
        self, schedule: Schedule, rank: int, weights: Mapping[int, Values], *, seed: int = 0, first: int = 0,
        watch: bool = False, after_forwards: Callable[[], None] | None = None,
        on_losses: Callable[[Mapping[int, torch.Tensor]], None] | None = None,
    ) -> Step:  # fmt: skip
        """Executes a rank's actions; `weights` are each stage's parameters and buffers for this step.

        In a step with backwards each micro-batch's loss counts 1 / micro-batches, and gradients accumulate into the
        `.grad` of the weights; random operators draw from `seed` (the step's, the same at every stage) and the
        micro-batch.  A step without backwards is evaluation: no dropout; with `watch` it looks at every value made
        (Step.overflows).  `first` is the number that the first micro-batch was fed with.  `after_forwards` is called
        once the last forward is done, `on_losses` as soon as all micro-batches' losses are known, at the final stage.
        Raises StageFailed naming the stage and action; what the channel raises passes through.
        """
        actions, queue, microbatches = schedule.ranks[rank], schedule.queue(rank), schedule.microbatches
        training = any(a.kind is not ActionKind.FORWARD for a in actions)
        step, began = Step(), time.perf_counter()
        self._watch, self._first = watch, first
        forwards = sum(a.kind is ActionKind.FORWARD for a in actions)
        try:
            while (action := queue.next(self._arrived)) is not None:
                known = len(step.losses)
                self.execute(action, microbatches, weights, step, training=training, began=began, seed=seed)
                queue.done(action)
                forwards -= action.kind is ActionKind.FORWARD
                if after_forwards is not None and not forwards:
                    after_forwards()
                    after_forwards = None
                if on_losses is not None and known < len(step.losses) == microbatches:
                    on_losses(step.losses)
        finally:
            self._live.clear()
            self._deferred.clear()
        return step

    def execute(
        self,
        action: Action,
        microbatches: int,
        weights: Mapping[int, Values],
        step: Step | None = None,
        *,
        training: bool = True,
        began: float = 0.0,
        seed: int = 0,
    ) -> Step:
        """Executes one action and notes in `step` what came of it."""
        step = step or Step()
        start = time.perf_counter()
        try:
            with torch.set_grad_enabled(training):
                if action.kind is ActionKind.FORWARD:
                    waited = self._forward(action, microbatches, weights[action.stage], step, training, seed)
                elif action.kind is ActionKind.WEIGHT_BACKWARD:
                    waited = self._weight_backward(action)
                else:
                    waited = self._backward(action, microbatches, weights[action.stage], seed)
        except NesaError:
            raise
        except Exception as e:
            raise StageFailed(f"stage {action.stage}: {action}: {type(e).__name__}: {e}") from e
        step.times.append(ActionTime(action, start - began, time.perf_counter() - began, waited))
        return step

    def _forward(self, a: Action, microbatches: int, weights: Values, step: Step, training: bool, seed: int) -> float:
        module = self.modules[a.stage]
        program = module.program
        arrival = time.perf_counter()
        inputs = [self._receive(tag) for tag in self._input_tags(a, program.inputs)]
        received = {v: self._receive(Tag(Kind.FORWARD, f"{v}>{a.stage}", a.microbatch)) for v in program.receives}
        wanted = self._targets_of(a.stage)
        targets = dict(zip(wanted, map(self._receive, self._input_tags(a, wanted)), strict=True))
        waited = time.perf_counter() - arrival
        if training:
            for v in program.differentiable & received.keys():
                received[v] = received[v].detach().requires_grad_()
        drawn = derive_seed(seed, a.microbatch) if training else None
        again = training and a.stage in self._recompute
        with torch.set_grad_enabled(training and not again):
            run = partial(_watched, module, (a.stage, a.microbatch), step) if self._watch else module.run
            made = dict(zip(program.returns, run(weights, *inputs, *received.values(), seed=drawn), strict=True))
        for v, readers in program.sends.items():
            for reader in readers:
                self.channel.send(
                    self.peers[reader], Tag(Kind.FORWARD, f"{v}>{reader}", a.microbatch), made[v].detach()
                )
        loss = None
        if a.stage == self.final:
            results = {v: made[v] for v in program.results}
            if self.loss is None:
                step.results[a.microbatch] = results
            else:
                with torch.set_grad_enabled(training and not again):
                    loss = self.loss(results, targets)
                step.losses[a.microbatch] = loss.detach()
        if training:
            kept = _Live(inputs, received, targets)
            self._live[a.stage, a.microbatch] = kept if again else replace(kept, made=made, loss=loss)
        return waited

    def _backward(self, a: Action, microbatches: int, weights: Values, seed: int) -> float:
        program = self.modules[a.stage].program
        live = self._live.pop((a.stage, a.microbatch))
        arrival = time.perf_counter()
        sent = [v for v in program.sends if v in program.differentiable]
        parts = {v: [self._receive(tag) for tag in _gradient_tags(a, v, program)] for v in sent}
        waited = time.perf_counter() - arrival
        if live.made is None:
            live = self._compute_again(a, live, weights, seed)
        assert live.made is not None
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor | None] = []
        if live.loss is not None:
            roots.append(live.loss)
            gradients.append(torch.full_like(live.loss, 1 / microbatches))
        for v in sent:
            if live.made[v].requires_grad:
                roots.append(live.made[v])
                gradients.append(sum(parts[v][1:], parts[v][0]))
        split = a.kind is ActionKind.INPUT_BACKWARD and self._weight_gradients is not None
        if split:
            self._weight_gradients.deferring = True  # type: ignore[union-attr]
        try:
            torch.autograd.backward(roots, gradients)
        finally:
            if split:
                self._weight_gradients.deferring = False  # type: ignore[union-attr]
                self._deferred[a.stage, a.microbatch] = self._weight_gradients.take()  # type: ignore[union-attr]
        for v, value in live.received.items():
            if v in program.differentiable:
                gradient = value.grad if value.grad is not None else torch.zeros_like(value)
                tag = Tag(Kind.GRADIENT, f"{v}>{a.stage}", a.microbatch)
                self.channel.send(self.peers[program.receives[v]], tag, gradient)
        return waited

    def _weight_backward(self, a: Action) -> float:
        for add in self._deferred.pop((a.stage, a.microbatch), ()):
            add()
        return 0.0

    def _compute_again(self, a: Action, live: _Live, weights: Values, seed: int) -> _Live:
        module = self.modules[a.stage]
        values = module.run(
            weights, *live.inputs, *live.received.values(), seed=derive_seed(seed, a.microbatch), again=True
        )
        made = dict(zip(module.program.returns, values, strict=True))
        loss = None
        if a.stage == self.final and self.loss is not None:
            loss = self.loss({v: made[v] for v in module.program.results}, live.targets)
        return replace(live, made=made, loss=loss)

    def _arrived(self, a: Action) -> bool:
        """Whether a forward or backward wouldn't wait."""
        program = self.modules[a.stage].program
        if a.kind is ActionKind.FORWARD:
            tags = self._input_tags(a, (*program.inputs, *self._targets_of(a.stage)))
            tags += [Tag(Kind.FORWARD, f"{v}>{a.stage}", a.microbatch) for v in program.receives]
        else:
            sent = (v for v in program.sends if v in program.differentiable)
            tags = [tag for v in sent for tag in _gradient_tags(a, v, program)]
        return all(map(self.channel.has, tags))

    def _targets_of(self, stage: int) -> Sequence[str]:
        return self.targets if stage == self.final and self.loss is not None else ()

    def _input_tags(self, a: Action, names: Sequence[str]) -> list[Tag]:
        return [Tag(Kind.INPUT, f"{name}>{a.stage}", self._first + a.microbatch) for name in names]

    def _receive(self, tag: Tag) -> torch.Tensor:
        tensor = self.channel.recv(tag, self.timeout_s)
        if tensor is None:
            raise StageFailed(f"{tag}: the sender had no tensor")
        return tensor

    def feed(self, programs: Sequence[StageProgram], number: int, values: Values) -> None:
        """Sends the inputs and targets of the micro-batch of that number to the stages that read them."""
        for program in programs:
            stage = program.id
            for name in (*program.inputs, *self._targets_of(stage)):
                self.channel.send(self.peers[stage], Tag(Kind.INPUT, f"{name}>{stage}", number), values[name])


def _gradient_tags(a: Action, value: str, program: StageProgram) -> list[Tag]:
    return [Tag(Kind.GRADIENT, f"{value}>{reader}", a.microbatch) for reader in program.sends[value]]


def _watched(module: StageModule, at: tuple[int, int], step: Step, *values: Any, **options: Any) -> Any:
    """module.run, looking at every value for the first that overflowed."""
    names = [i.name for i in module.program.instructions]

    def mark(i: int, value: Any) -> None:
        if at not in step.overflows and any(overflowed(t) for t in tensors(value)):
            step.overflows[at] = names[i]

    return module.marked()(mark, *values, **options)


def overflowed(tensor: torch.Tensor) -> bool:
    """Whether there is a NaN or +inf in it."""
    return tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any())
