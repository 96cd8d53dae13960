"""A step's gradients as they become whole, so that they can be reduced while the last backwards still run.

A captured graph is static: in every step each gradient is added to equally often.  The first step counts; from the
second on, a gradient is whole when as much has been added as then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from functools import partial

import torch

from nesa_ray.errors import StageFailed


def add_gradient(weight: torch.Tensor, gradient: torch.Tensor) -> None:
    """Adds a micro-batch's gradient to where the weight's gradients add up (see precision.py)."""
    to = getattr(weight, "master", weight)
    if to.grad is None:
        to.grad = gradient.to(to.dtype)
    else:
        to.grad.add_(gradient)
    note_added(to)


def note_added(leaf: torch.Tensor) -> None:
    """Tells who watches the leaf that something was added to its gradient, other than by autograd."""
    added = getattr(leaf, "on_gradient", None)
    if added is not None:
        added()


class GradientCounts:
    """How often each gradient is added to in a step; empty before the first has ended."""

    def __init__(self) -> None:
        self.additions: dict[str, int] = {}


class StepGradients:
    """The gradients of one step's leaves.  One thread computes and calls `finish` (or `fail`); another may `take`.

    names   in the order in which they are expected to be whole, the same on every replica
    counts  of the step before; None: nothing is added any more
    late    those that are whole only at `finish`, something being added from elsewhere
    """

    def __init__(
        self,
        leaves: Mapping[str, torch.Tensor],
        names: Iterable[str],
        counts: GradientCounts | None,
        late: Collection[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.first_s: float | None = None  # time.perf_counter() when the first was taken
        self._leaves, self._counts, self._late = dict(leaves), counts or GradientCounts(), frozenset(late)
        self._added = dict.fromkeys(self._leaves, 0)
        self._taken: set[str] = set()
        self._finished = counts is None
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._hooks = []
        for name, leaf in self._leaves.items() if counts is not None else ():
            note = partial(self._note, name)
            leaf.on_gradient = note
            self._hooks.append(leaf.register_post_accumulate_grad_hook(lambda _, note=note: note()))

    @classmethod
    def whole(cls, leaves: Mapping[str, torch.Tensor]) -> StepGradients:
        """Those of leaves that nothing is added to any more."""
        return cls(leaves, leaves, None)

    def wait(self) -> None:
        """Until the first is whole.  Raises what `fail` was told."""
        if self.names:
            self._wait(self.names[0])

    def take(self, name: str) -> torch.Tensor:
        """Waits until the gradient is whole; the leaf then no longer holds it.  Zeros where nothing was added.

        Raises what `fail` was told.
        """
        self._wait(name)
        self.first_s = self.first_s or time.perf_counter()
        leaf = self._leaves[name]
        gradient, leaf.grad = leaf.grad, None
        return gradient if gradient is not None else torch.zeros_like(leaf)

    def finish(self) -> None:
        """Nothing will be added any more."""
        with self._changed:
            self._finished = True
            self._counts.additions = dict(self._added)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Makes every wait raise `error`."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def close(self) -> None:
        """Lets go of the leaves."""
        for leaf, hook in zip(self._leaves.values(), self._hooks, strict=False):
            hook.remove()
            del leaf.on_gradient
        self._leaves.clear()

    def _wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._is_whole(name))
            if self._failure is not None:
                raise self._failure
            self._taken.add(name)

    def _is_whole(self, name: str) -> bool:
        expected = self._counts.additions.get(name)
        return self._finished or (name not in self._late and expected is not None and self._added[name] >= expected)

    def _note(self, name: str) -> None:
        with self._changed:
            self._added[name] += 1
            if name in self._taken:
                raise StageFailed(f"parameter {name}: more was added to its gradient than in the step before")
            if self._is_whole(name):
                self._changed.notify_all()
