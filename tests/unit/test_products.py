"""Products by oneDNN equal torch's own, values and gradients, whatever the shapes and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nesa_ray import products
from nesa_ray.products import addmm, linear, matmul, product
from nesa_ray.runtime.weight_gradient import WeightGradients

LARGE = (8, 64, 96, 160)  # batch, tokens, in, out: more than LEAST_FLOPS


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert float((a - b).norm()) <= 2e-6 * float(b.norm()) + 1e-30


def case(batch: int, tokens: int, wide: int, out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, tokens, wide), torch.randn(out, wide), torch.randn(out)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_equal_torch(rows: int, wide: int, out: int, strided: bool, biased: bool) -> None:
    x, w, b = case(rows, 33, wide, out)
    if strided:
        x, w = x.transpose(0, 1), w.t().contiguous().t()
    bias = b if biased else None
    close(product(x, w, bias), torch.nn.functional.linear(x, w, bias))
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    others = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    gradient = torch.randn_like(torch.nn.functional.linear(x, w))
    linear(leaves[0], leaves[1], leaves[2] if biased else None).backward(gradient)
    torch.nn.functional.linear(others[0], others[1], others[2] if biased else None).backward(gradient)
    for mine, reference in zip(leaves[: 2 + biased], others, strict=False):
        assert mine.grad is not None
        assert reference.grad is not None
        close(mine.grad, reference.grad)


@pytest.mark.parametrize("shape", [LARGE, (1, 3, 5, 7)])
@pytest.mark.parametrize("name", ["linear", "addmm", "matmul"])
def test_every_form_of_a_product_accumulates_weight_gradients(shape: tuple[int, ...], name: str) -> None:
    store = WeightGradients()
    x, w, b = case(*shape)
    x = x.flatten(0, 1)
    weight, bias = (w if name == "linear" else w.t().contiguous()).requires_grad_(), b.requires_grad_()
    calls = {
        "linear": lambda f: f(x, weight, bias),
        "addmm": lambda f: f(bias, x, weight),
        "matmul": lambda f: f(x, weight),
    }
    call = calls[name]
    for _ in range(3):
        call(store.operators[f"aten.{name}.default"]).square().mean().backward()
    mine = [t.grad for t in (weight, bias)]
    weight.grad = bias.grad = None
    for _ in range(3):
        call(getattr(torch.ops.aten, name).default).square().mean().backward()
    for got, reference in zip(mine, (weight.grad, bias.grad), strict=True):
        assert (got is None) == (reference is None)
        if got is not None and reference is not None:
            close(got, reference)


def test_a_deferred_product_waits() -> None:
    store = WeightGradients()
    x, w, b = case(*LARGE)
    w.requires_grad_()
    store.deferring = True
    store.operators["aten.linear.default"](x, w, b).sum().backward()
    assert w.grad is None
    [add] = store.take()
    add()
    assert w.grad is not None


def test_what_onednn_does_not_take_goes_to_torch() -> None:
    x, w, b = case(*LARGE)
    for convert in (torch.Tensor.double, torch.Tensor.bfloat16):
        assert torch.equal(
            product(convert(x), convert(w), convert(b)), torch.nn.functional.linear(*map(convert, (x, w, b)))
        )
    assert product(x[:0], w, b).shape == (0, 64, 160)
    square = torch.randn(300, 300)
    assert torch.equal(addmm(square, square, square, beta=2), torch.addmm(square, square, square, beta=2))
    assert torch.equal(matmul(square[0], square[1]), square[0] @ square[1])
    stacked = torch.randn(2, 30, 30)
    assert torch.equal(matmul(stacked, stacked), stacked @ stacked)


@pytest.mark.skipif(not products.ONEDNN, reason="this processor has no AVX-512")
def test_large_products_take_the_fast_library() -> None:
    x, w, _ = case(*LARGE)
    with torch.profiler.profile() as seen:
        product(x, w)
    assert any("mkldnn" in e.key for e in seen.key_averages())
