"""Local steps: replicas that train by themselves and agree now and then, for links too slow for every step.

DiLoCo (Douillard et al., arXiv 2311.08105): each replica takes `steps` AdamW steps; then what they have changed on
average, the pseudo-gradient, is the gradient of an outer optimizer, SGD with Nesterov momentum, whose parameters all
replicas go on from.  As in Streaming DiLoCo (arXiv 2501.18512) the parameters are agreed on fragment by fragment, in
few bits, while training goes on: a fragment's new values come in `delay` steps later, and what a replica has changed in
these is kept on top of them.  When they come is counted in steps, so that the speed of the link changes no result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nesa_ray.runtime.averaging import Mean
from nesa_ray.runtime.gradients import StepGradients
from nesa_ray.runtime.zero import MOMENTS, LocalConfig, Moments, OptimizerConfig, ReplicatedOptimizer

OUTER = "outer_momentum"


@dataclass
class _Fragment:
    """Parameters that are agreed on together.  `agreed` and `momentum` are flat; `flight`: values when it began."""

    parameters: dict[str, torch.nn.Parameter]
    agreed: torch.Tensor
    momentum: torch.Tensor
    flight: tuple[int, torch.Tensor, Future[None]] | None = None

    def flat(self) -> torch.Tensor:
        """A copy of the values."""
        return torch.cat([p.detach().flatten() for p in self.parameters.values()])

    def parts(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, its part of a flat tensor in its shape)."""
        at = 0
        for name, p in self.parameters.items():
            yield name, flat[at : at + p.numel()].view(p.shape)
            at += p.numel()


class LocalStepsOptimizer:
    """A StageOptimizer (zero.py) whose replicas differ between agreements; `settle` makes them one."""

    moment_names = (*MOMENTS, OUTER)

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig, local: LocalConfig
    ) -> None:
        self._inner = ReplicatedOptimizer(parameters, config, 1)
        self._parameters, self._config, self._steps = dict(parameters), local, 0
        self._fragments = [
            _Fragment(part, flat := torch.cat([p.detach().flatten() for p in part.values()]), torch.zeros_like(flat))
            for part in _fragments(parameters, local.fragments)
        ]
        self._mean, self._exact = Mean(local.codec, feedback=False), Mean()
        self._thread = ThreadPoolExecutor(1, "agree")

    def weights(self) -> contextlib.AbstractContextManager[dict[str, torch.Tensor]]:
        """See StageOptimizer."""
        return self._inner.weights()

    def reduce(self, gradients: StepGradients, *, norm: bool = False) -> float:
        """See StageOptimizer; the replica's own gradients."""
        return self._inner.reduce(gradients, norm=norm)

    def update(self, lr: float, scale: float = 1.0) -> None:
        """See StageOptimizer."""
        self._inner.update(lr, scale)
        self._count()

    def skip(self) -> None:
        """See StageOptimizer."""
        self._count()

    def settle(self, *, moments: bool = False) -> None:
        """See StageOptimizer: agrees on everything, now; moments are averaged as they are, in fp32."""
        for i, fragment in enumerate(self._fragments):
            self._land(fragment)
            self._begin(i, fragment)
            self._land(fragment)
        for moment in MOMENTS if moments else ():
            of = self._inner.moments()[moment]
            for name in self._parameters:
                if name in of:
                    of[name].copy_(self._exact(name, of[name].flatten()).view_as(of[name]))

    def moments(self) -> Moments:
        """See StageOptimizer."""
        outer = {name: part for f in self._fragments for name, part in f.parts(f.momentum)}
        return {**self._inner.moments(), OUTER: outer}

    def load(self, moments: Moments, steps: int) -> None:
        """See StageOptimizer."""
        self._inner.load(moments, steps)
        self._steps = steps
        for fragment in self._fragments:
            for name, part in fragment.parts(fragment.momentum):
                if name in moments.get(OUTER, {}):
                    part.copy_(moments[OUTER][name])

    def _count(self) -> None:
        """Ends a step: takes in what was agreed on, and begins to agree on what it is time for."""
        self._steps += 1
        every, count = self._config.steps, len(self._fragments)
        for i, fragment in enumerate(self._fragments):
            if fragment.flight is not None and fragment.flight[0] <= self._steps:
                self._land(fragment)
            if self._steps % every == (i + 1) * every // count % every:
                self._begin(i, fragment)
                if not self._config.delay:
                    self._land(fragment)

    def _begin(self, index: int, fragment: _Fragment) -> None:
        values = fragment.flat()
        agreeing = self._thread.submit(self._agree, f"fragment {index}", fragment, fragment.agreed - values)
        fragment.flight = (self._steps + self._config.delay, values, agreeing)

    def _agree(self, name: str, fragment: _Fragment, change: torch.Tensor) -> None:
        gradient = self._mean(name, change)
        fragment.momentum.mul_(self._config.momentum).add_(gradient)
        fragment.agreed.sub_(gradient.add_(fragment.momentum, alpha=self._config.momentum), alpha=self._config.lr)

    def _land(self, fragment: _Fragment) -> None:
        """Goes on from what was agreed on, with what has been learnt meanwhile."""
        if fragment.flight is None:
            return
        _, values, agreeing = fragment.flight
        agreeing.result()
        fragment.flight = None
        with torch.no_grad():
            for name, part in fragment.parts(fragment.agreed + (fragment.flat() - values)):
                fragment.parameters[name].copy_(part)


def _fragments(parameters: Mapping[str, torch.nn.Parameter], count: int) -> list[dict[str, torch.nn.Parameter]]:
    """Neighbours together, in about equal parts; no more than there are parameters."""
    whole, done = sum(p.numel() for p in parameters.values()), 0
    found: dict[int, dict[str, torch.nn.Parameter]] = {}
    for name, p in parameters.items():
        middle = done + p.numel() // 2
        found.setdefault(min(count - 1, middle * count // whole), {})[name] = p
        done += p.numel()
    return list(found.values())
