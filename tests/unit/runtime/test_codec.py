"""Codecs: each is held to the error that it states, whatever the values, shapes, layouts and dtypes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nesa_ray.runtime.codec import CODECS, FLOAT_CODECS, TINY
from nesa_ray.runtime.link_codec import Encoder, LinkCodec, decoded
from nesa_ray.runtime.message import CODEC_NAMES, RAW, Kind, Tag

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = sorted(FLOAT_CODECS)


def there_and_back(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """None: it goes raw."""
    payload = CODECS[name].encode(tensor)
    if payload is None:
        return None
    assert payload.dtype == np.uint8
    assert payload.nbytes < tensor.nbytes
    return decoded(name, payload, tensor.shape, tensor.dtype)


def check(name: str, tensor: torch.Tensor) -> None:
    got, bound = there_and_back(name, tensor), CODECS[name].bound(tensor)
    assert bound.shape == tensor.shape
    if got is None:
        assert not bound.any()
        return
    assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
    assert got.isfinite().all()
    assert ((got.double() - tensor.double()).abs() <= bound).all()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Normal values times a power of two for each row and column, some of them zero, of any layout."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(st.lists(st.integers(0, 70), min_size=0, max_size=3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    middle, spread = draw(st.integers(-160, 127)), draw(st.integers(0, 20))
    for dim in range(len(shape)):
        exponents = torch.randint(-spread, spread + 1, (shape[dim],), generator=g)
        x = x * (2.0**exponents).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    x = x * 2.0**middle * (torch.rand(shape, generator=g) < draw(st.sampled_from([1.0, 0.5, 0.01])))
    if draw(st.booleans()) and len(shape) > 1:
        x = x.transpose(0, -1)
    if draw(st.booleans()) and len(shape) > 0:
        x = x[::2]
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(tensor=tensors())
def test_within_the_bound(name: str, tensor: torch.Tensor) -> None:
    check(name, tensor)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(values=arrays.arrays(np.float32, st.integers(2, 150), elements=st.floats(width=32, allow_infinity=False, allow_nan=False)))  # fmt: skip # noqa: E501
def test_within_the_bound_with_any_finite_values(name: str, values: np.ndarray) -> None:
    """Subnormal numbers and the largest ones among them."""
    check(name, torch.from_numpy(values))


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_what_the_table_says(name: str) -> None:
    """Of the values of a block of 2048 or 64, a column of outliers apart; at ordinary sizes nothing goes raw."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).clamp(-5, 5)
    x[0, 0], x[:, 7] = 5.0, 300.0
    largest = {"bf16": x.abs() / 255, "int8": torch.full_like(x, 300 / 253)}
    largest["int8_mixed"] = torch.full_like(x, 5 / 253)
    largest["int8_mixed"][:, 7] = 300 / 255
    mean = x.abs().reshape(-1, 2048).mean(1, keepdim=True).expand(-1, 2048).reshape(64, 256)
    largest["int4"] = (mean / 4.5).clamp_min(300 / 253)
    bound = CODECS[name].bound(x)
    assert (bound > 0).all()
    assert (bound <= largest[name].double() * (1 + 1e-6) + TINY).all()
    check(name, x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_stays_as_it_is(name: str, value: float, dtype: torch.dtype) -> None:
    x = torch.randn(100, 64).to(dtype)
    x[70, 3] = value
    assert there_and_back(name, x) is None
    assert not CODECS[name].bound(x).any()


def test_what_a_codec_cannot_hold_goes_raw() -> None:
    """Beyond float32's range, or what rounds to bfloat16's infinity; what wouldn't shrink; integers."""
    largest = torch.finfo(torch.float32).max
    assert all(there_and_back(n, torch.full((300,), 1e300, dtype=torch.float64)) is None for n in NAMES)
    assert there_and_back("bf16", torch.full((300,), largest)) is None
    assert there_and_back("int8", torch.full((300,), largest)) is not None
    assert there_and_back("bf16", torch.randn(9).to(torch.float16)) is None
    for kind in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
        assert all(there_and_back(n, torch.ones(1000).to(kind)) is None for n in NAMES)
    assert all(there_and_back(n, torch.ones(shape)) is None for n in NAMES for shape in ((0,), (3, 0)))


def test_bytes() -> None:
    """A half and a quarter of fp32, and the scales; entropy-coded less than an eighth, whatever the distribution."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=g)
    sizes = {n: CODECS[n].encode(x).nbytes for n in NAMES}
    blocks = x.numel() // 2048
    del sizes["int4"]
    assert sizes == {"bf16": 2 * x.numel(), "int8": x.numel() + 4 * blocks, "int8_mixed": x.numel() + 4 * blocks + 4}
    assert all(sizes[n] == FLOAT_CODECS[n].n_bytes(x.numel()) for n in sizes)
    uniform = torch.rand(512, 256, generator=g) - 0.5
    for values in (x, x * x, x**3, uniform, uniform.sign(), (uniform / (1 - 2 * uniform.abs())), x * (uniform > 0.45)):
        assert CODECS["int4"].encode(values).nbytes < 0.475 * x.numel()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_integers_exactly(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]))
    shape, seed = data.draw(st.lists(st.integers(0, 70), max_size=3)), data.draw(st.integers(0, 2**32))
    bits = data.draw(st.integers(1, 62))
    x = torch.randint(-(2**bits), 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if data.draw(st.booleans()) and x.dim():
        x = x.transpose(0, -1)[::2]
    payload = CODECS["planes"].encode(x)
    assert not CODECS["planes"].bound(x).any()
    if payload is not None:
        assert payload.nbytes < x.nbytes
        assert torch.equal(decoded("planes", payload, x.shape, x.dtype), x)
    else:
        assert x.numel() < 100 or bits > 8 or x.element_size() == 1


def test_labels_in_a_quarter() -> None:
    """Token ids below 4,096, int64: some fourteen bits each, and the code's table."""
    labels = torch.randint(0, 4096, (2, 128), generator=torch.Generator().manual_seed(0))
    assert CODECS["planes"].encode(labels).nbytes < labels.nbytes / 3.9
    assert CODECS["planes"].encode(torch.randn(100)) is None


def test_outliers_cost_the_others_nothing() -> None:
    """Two features a hundred times larger: the mixed decomposition keeps the rest as exact as without them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=g)
    x[:, [3, 200]] *= 100
    rest = torch.ones(256, dtype=torch.bool)
    rest[[3, 200]] = False
    error = {n: float((there_and_back(n, x) - x)[:, rest].abs().mean()) for n in ("int8", "int8_mixed")}
    assert error["int8_mixed"] < error["int8"] / 30


def test_a_payload_of_another_size_is_refused() -> None:
    for name in NAMES:
        payload = CODECS[name].encode(torch.randn(10, 64))
        with pytest.raises(ValueError, match="the payload has"):
            decoded(name, payload, torch.Size((8, 63)), torch.float32)
    labels = torch.arange(1000)
    for payload in (CODECS["planes"].encode(labels), np.zeros(100, np.uint8)):
        with pytest.raises(ValueError, match="the payload has"):
            decoded("planes", payload, torch.Size((999,)), torch.int64)


def test_names_are_numbered_in_the_order_of_the_header() -> None:
    assert (RAW, *FLOAT_CODECS) == CODEC_NAMES


def test_error_feedback() -> None:
    """The sum of the gradients sent is that of those meant, to within one message's error; activations have none."""
    encoder = Encoder({"b": LinkCodec(activations="int4", gradients="int4")})
    g = torch.Generator().manual_seed(0)
    meant, sent = torch.zeros(40, 33), torch.zeros(40, 33)
    worst = torch.zeros(40, 33, dtype=torch.float64)
    for i in range(30):
        gradient = torch.randn(40, 33, generator=g) + 0.01  # much less than a step of the levels
        got, n_bytes = encoder.through("b", Tag(Kind.GRADIENT, "x", i), gradient)
        assert n_bytes < FLOAT_CODECS["int4"].n_bytes(gradient.numel())
        lost = meant - sent
        worst = CODECS["int4"].bound(gradient + lost)
        meant, sent = meant + gradient, sent + got
        assert ((sent - meant).abs() <= worst + 1e-5).all()
        alone, _ = encoder.through("b", Tag(Kind.GRADIENT, f"other {i}", i), gradient)
        assert ((alone - gradient).abs() <= CODECS["int4"].bound(gradient)).all()
        forward, _ = encoder.through("b", Tag(Kind.FORWARD, "x", i), gradient)
        assert torch.equal(forward, alone)


def test_error_feedback_forgets_what_is_not_finite() -> None:
    """A gradient with a NaN in it goes raw, and takes what was carried with it; another shape starts anew."""
    encoder = Encoder({"b": LinkCodec(gradients="int4")})
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    first, _ = encoder.through("b", Tag(Kind.GRADIENT, "x", 0), x)
    assert not torch.equal(encoder.through("b", Tag(Kind.GRADIENT, "x", 1), x)[0], first)
    spoiled = x.clone()
    spoiled[2, 2] = torch.nan
    assert encoder.through("b", Tag(Kind.GRADIENT, "x", 2), spoiled)[0] is spoiled
    assert torch.equal(encoder.through("b", Tag(Kind.GRADIENT, "x", 3), x)[0], first)
    assert encoder.through("b", Tag(Kind.GRADIENT, "x", 4), x[:5])[0].shape == (5, 64)


def test_the_largest_float16_stays_finite() -> None:
    tensor = torch.ones(64, 64, dtype=torch.float16)
    tensor[:, 3] = 65504.0
    for codec in CODECS.values():
        payload = codec.encode(tensor)
        got = tensor if payload is None else torch.empty_like(tensor)
        if payload is not None:
            codec.decode(payload, got)
        assert got.isfinite().all()
