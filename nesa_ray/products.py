"""Products with weights, by the faster of torch's two libraries on this processor.

torch multiplies float32 matrices with MKL, which keeps to 256-bit vectors on processors that aren't Intel's.  oneDNN,
which comes with torch too, doesn't.  Measured on a Zen 5 core, [512, 256] · [256, 1024]: MKL 87 GFLOP/s, oneDNN 205,
and as much on each of two cores at once.  Small products stay with MKL, which starts faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

LEAST_FLOPS = 4e6
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """aten.linear without autograd: x [..., I] · weight [O, I] transposed + bias [O] -> [..., O]; any strides."""
    if not _pays(x, weight):
        return aten.linear.default(x, weight, bias)
    rows = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    return rows.view(*x.shape[:-1], len(weight))


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [M, N] += a [M, K] · b [N, K] transposed."""
    if _pays(a, b):
        total.add_(product(a, b))
    else:
        total.addmm_(a, b.t())


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, add: Adder | None = None
) -> torch.Tensor:
    """aten.linear by `product`, differentiable once.

    `add`, where given, is called with what the gradients of weight and bias are made of, and autograd gets none.
    """
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    if add is None and not _pays(x, weight):
        return aten.linear.default(x, weight, bias)
    return _Linear.apply(x, weight, bias, add)


def addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, **scales: float) -> torch.Tensor:
    """aten.addmm: bias + x [N, I] · weight [I, O]."""
    if scales or bias.shape != weight.shape[1:]:
        return aten.addmm.default(bias, x, weight, **scales)
    return linear(x, weight.t(), bias)


def matmul(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """aten.matmul: x [..., I] · other [I, O], or whatever else it takes."""
    if x.dim() < 2 or other.dim() != 2:
        return aten.matmul.default(x, other)
    return linear(x, other.t())


PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "aten.linear.default": linear,
    "aten.addmm.default": addmm,
    "aten.mm.default": matmul,
    "aten.matmul.default": matmul,
}
# (gradient of the output [..., O], x [..., I]) -> nothing
Adder = Callable[[torch.Tensor, torch.Tensor], None]


def _pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN can take it and is faster."""
    return (
        ONEDNN
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and 2.0 * x.numel() * len(weight) >= LEAST_FLOPS
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, add: Adder | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.add = add
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        to_weight = to_bias = None
        if ctx.add is not None:
            ctx.add(gradient, x)
        else:
            rows = gradient.reshape(-1, gradient.shape[-1])
            if ctx.needs_input_grad[1]:
                to_weight = product(rows.t(), x.reshape(-1, x.shape[-1]).t())
            if ctx.needs_input_grad[2]:
                to_bias = rows.sum(0)
        to_input = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        return to_input, to_weight, to_bias, None
