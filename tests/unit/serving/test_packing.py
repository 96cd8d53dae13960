import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.products import PackedProduct, packed

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiler")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 300), st.integers(1, 200), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_a_packed_product_is_the_product(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else torch.zeros(outputs, dtype=dtype)
    got = PackedProduct(dtype)(x, packed(weight), bias if biased else None, outputs)
    exact = x.double() @ weight.double().t() + bias.double()
    size = x.double().abs() @ weight.double().abs().t() + bias.double().abs() + 1e-3  # of what is added up
    assert got.dtype == dtype
    assert got.shape == (rows, outputs)
    assert float(((got.double() - exact).abs() / size).max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [96, 5001])  # the second in several blocks
def test_a_row_doesnt_depend_on_the_rows_beside_it(dtype: torch.dtype, inputs: int) -> None:
    x, weight = torch.randn(23, inputs).to(dtype), packed(torch.randn(130, inputs).to(dtype))
    product = PackedProduct(dtype)
    together = product(x, weight, None, 130)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13):
        parts = [product(x[i : i + rows], weight, None, 130) for i in range(0, 23, rows)]
        assert torch.equal(torch.cat(parts), together)


def test_leading_dimensions_and_strides_are_kept() -> None:
    x, weight = torch.randn(1, 6, 40)[..., 4:20], torch.randn(70, 16)
    got = PackedProduct(torch.float32)(x, packed(weight), None, 70)
    torch.testing.assert_close(got, x @ weight.t())


def test_threads_compute_the_same() -> None:
    x, weight = torch.randn(9, 300), packed(torch.randn(500, 300))
    alone = PackedProduct(torch.float32)(x, weight, None, 500)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        assert torch.equal(PackedProduct(torch.float32)(x, weight, None, 500), alone)
    finally:
        torch.set_num_threads(threads)
