import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nesa_ray.graph.split import Instruction, Ref, StageProgram
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.products import Grouped, PackedProduct, packed, packs
from nesa_ray.serving.packing import grouped_products, pack

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


def test_a_grouped_product_is_each_groups_and_zero_for_rows_of_none() -> None:
    torch.manual_seed(0)
    x, weights, offsets = torch.randn(7, 33), torch.randn(4, 70, 33), torch.tensor([2, 2, 5, 6])
    made = torch.stack([packed(w) for w in weights])
    got = Grouped(PackedProduct(torch.float32))(x, offsets, 70, made, None, 70)
    for row, group in enumerate([0, 0, 2, 2, 2, 3]):
        torch.testing.assert_close(got[row], weights[group] @ x[row])
    assert not bool(got[6].any())
    assert Grouped(PackedProduct(torch.float32))(x[:0], torch.zeros(4), 70, made, None, 70).shape == (0, 70)


def experts(*instructions: Instruction, results: tuple[str, ...] = ("product",)) -> StageProgram:
    return StageProgram(
        id=0, inputs=("x", "offsets"), receives={}, sends={}, results=results, state=("w",), borrows={}, lends={},
        trainable=frozenset(), differentiable=frozenset(), instructions=instructions,
    )  # fmt: skip


@pytest.mark.parametrize("dims", [(-2, -1), (2, 1), None])
def test_experts_are_packed_however_their_weight_lies(dims: tuple[int, int] | None) -> None:
    weight, x, offsets = torch.randn(3, 33, 70), torch.randn(5, 33), torch.tensor([1, 4, 5])
    target = "transformers.grouped_mm_fallback.default"
    if dims is None:
        program = experts(Instruction("product", target, (Ref("x"), Ref("state:w"), Ref("offsets")), {}))
    else:
        program = experts(
            Instruction("view", "aten.transpose.int", (Ref("state:w"), *dims), {}),
            Instruction("product", target, (Ref("x"), Ref("view"), Ref("offsets")), {}),
        )
    state = {"w": weight if dims is None else weight.transpose(1, 2).contiguous()}
    made, parts = pack(program, state, torch.float32, torch.device("cpu"))
    if not packs(torch.float32):
        assert made is program
        return
    (step,) = made.instructions
    arguments = [parts[a.name.removeprefix("state:")] if isinstance(a, Ref) else a for a in step.args[2:]]
    got = Grouped(PackedProduct(torch.float32))(x, offsets, *arguments)
    for row, group in enumerate([0, 1, 1, 1, 2]):
        torch.testing.assert_close(got[row], x[row] @ weight[group], atol=1e-4, rtol=1e-4)


def test_a_view_of_experts_that_others_read_stays() -> None:
    view = Instruction("view", "aten.transpose.int", (Ref("state:w"), 1, 2), {})
    product = Instruction("product", "aten._grouped_mm.default", (Ref("x"), Ref("view"), Ref("offsets")), {})
    assert len(grouped_products(experts(view, product), {"w"})) == 1
    assert not grouped_products(experts(view, product, results=("product", "view")), {"w"})
    other = Instruction("other", "aten.sum.default", (Ref("view"),), {})
    assert not grouped_products(experts(view, product, other, results=("product", "other")), {"w"})


PRODUCTS_HERE = """
import torch
from nesa_ray.serving.native.products import PackedProduct, packed
torch.manual_seed(0)
for dtype, error in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
    for rows, inputs, outputs in ((1, 33, 70), (3, 64, 130), (17, 31, 64), (40, 5000, 65)):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        made, product = packed(weight), PackedProduct(dtype)
        got = product(x, made, None, outputs)
        size = x.double().abs() @ weight.double().abs().t() + 1e-3
        assert float(((got.double() - x.double() @ weight.double().t()).abs() / size).max()) <= error, (dtype, rows)
        assert torch.equal(got, torch.cat([product(row, made, None, outputs) for row in x.split(1)])), (dtype, rows)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another processor's flags")
@pytest.mark.parametrize("without", ["-mno-amx-bf16", "-mno-avx512bf16", "-mno-avx512f"])
def test_products_are_right_where_the_processor_has_less(without: str, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {without}\n')
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PRODUCTS_HERE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
