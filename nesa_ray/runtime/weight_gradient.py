"""Operators whose weight gradients are added in place, at once or later.

Autograd makes a new tensor for each micro-batch's weight gradient and then adds it to the sum.  Here the product goes
straight into the sum, and it can wait: the zero-bubble schedule (Qi et al., arXiv 2401.10241) does the part of a
backward that others wait for first, the weights' later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nesa_ray.products import PRODUCTS, add_product, addmm, linear, product
from nesa_ray.runtime.gradients import add_gradient, note_added

aten = torch.ops.aten


class WeightGradients:
    """Collects the weight gradients of one rank's backwards; `deferring` keeps them for `take` and `add`.

    `operators` are what a StageModule binds its instructions to.  Not thread-safe: one rank, one compute thread.
    """

    def __init__(self) -> None:
        self.deferring = False
        self._pending: list[Callable[[], None]] = []
        self.operators: dict[str, Callable[..., Any]] = {
            **PRODUCTS,
            "aten.linear.default": self.linear,
            "aten.addmm.default": self.addmm,
            "aten.embedding.default": self.embedding,
        }

    def take(self) -> list[Callable[[], None]]:
        """What has been deferred since the last call; calling each adds its gradient."""
        pending, self._pending = self._pending, []
        return pending

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """aten.linear: x [..., I], weight [O, I], bias [O] -> [..., O]."""
        if not _adds(weight, bias):
            return linear(x, weight, bias)
        return linear(x, weight, bias, add=lambda g, x: self.submit(lambda: _add_linear(weight, bias, g, x)))

    def addmm(self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **scales: float) -> torch.Tensor:
        """aten.addmm: bias [O] + x [N, I] · weight [I, O]."""
        if scales or bias.shape != weight.shape[1:] or not _adds(weight, bias):
            return addmm(bias, x, weight, **scales)
        add = partial(_add_linear, weight, bias, transposed=True)
        return linear(x, weight.t(), bias, add=lambda g, x: self.submit(lambda: add(g, x)))

    def embedding(
        self, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int = -1, scale: bool = False, sparse: bool = False
    ) -> torch.Tensor:
        """aten.embedding: weight [V, D], ids [...] -> [..., D]."""
        if torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf and not (scale or sparse):
            return _Embedding.apply(weight, ids, padding_idx, self)
        return aten.embedding.default(weight, ids, padding_idx, scale, sparse)

    def submit(self, add: Callable[[], None]) -> None:
        """Adds a gradient now, or keeps it."""
        if self.deferring:
            self._pending.append(add)
        else:
            add()


def _adds(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether this is training, and of parameters themselves rather than of something computed from them."""
    computed = bias is not None and bias.requires_grad and not bias.is_leaf
    return torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf and not computed


def _add_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gradient: torch.Tensor,
    x: torch.Tensor,
    *,
    transposed: bool = False,
) -> None:
    """Adds the gradients of x · weight [O, I] transposed + bias, or (transposed) of x · weight [I, O] + bias."""
    rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    a, b = (inputs.t(), rows.t()) if transposed else (rows.t(), inputs.t())
    if weight.grad is None or weight.grad.dtype is not rows.dtype:
        add_gradient(weight, product(a, b))
    else:
        add_product(weight.grad, a, b)
        note_added(weight)
    if bias is not None and bias.requires_grad:
        add_gradient(bias, rows.sum(0))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int, store: WeightGradients
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding_idx, ctx.store = padding_idx, store
        return aten.embedding.default(weight, ids)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        weight, ids = ctx.saved_tensors
        padding_idx = ctx.padding_idx

        def add() -> None:
            sums = getattr(weight, "master", weight)
            if sums.grad is None:
                sums.grad = torch.zeros_like(sums)
            rows = gradient.reshape(-1, gradient.shape[-1])
            if padding_idx >= 0:
                rows = rows * (ids.reshape(-1, 1) != padding_idx)
            sums.grad.index_add_(0, ids.reshape(-1), rows.to(sums.dtype))
            note_added(sums)

        ctx.store.submit(add)
        return None, None, None, None
