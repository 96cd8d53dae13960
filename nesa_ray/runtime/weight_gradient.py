"""Operators whose weight gradients are added in place, at once or later.

Autograd makes a new tensor for each micro-batch's weight gradient and then adds it to the sum.  Here the product is
accumulated straight into the sum (`addmm_`), which saves two passes over the weights, and it can wait: the zero-bubble
schedule (Qi et al., arXiv 2401.10241) does the part of a backward that others wait for first, the weights' later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nesa_ray.runtime.precision import add_gradient

aten = torch.ops.aten


class WeightGradients:
    """Collects the weight gradients of one rank's backwards; `deferring` keeps them for `take` and `add`.

    `operators` are what a StageModule binds its instructions to.  Not thread-safe: one rank, one compute thread.
    """

    def __init__(self) -> None:
        self.deferring = False
        self._pending: list[Callable[[], None]] = []
        self.operators: dict[str, Callable[..., Any]] = {
            "aten.linear.default": self.linear,
            "aten.embedding.default": self.embedding,
        }

    def take(self) -> list[Callable[[], None]]:
        """What has been deferred since the last call; calling each adds its gradient."""
        pending, self._pending = self._pending, []
        return pending

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """aten.linear: x [..., I], weight [O, I], bias [O] -> [..., O]."""
        if torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf:
            return _Linear.apply(x, weight, bias, self)
        return aten.linear.default(x, weight, bias)

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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, store: WeightGradients
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.store = bias, store
        return aten.linear.default(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        bias = ctx.bias

        def add() -> None:
            g, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            if weight.grad is None or weight.grad.dtype is not g.dtype:
                add_gradient(weight, g.t() @ inputs)
            else:
                weight.grad.addmm_(g.t(), inputs)
            if bias is not None and bias.requires_grad:
                add_gradient(bias, g.sum(0))

        ctx.store.submit(add)
        to_input = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        return to_input, None, None, None


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

        ctx.store.submit(add)
        return None, None, None, None
