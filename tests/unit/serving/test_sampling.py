import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nesa_ray.errors import InvalidInput
from nesa_ray.serving import scheduler
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.choice import Asked
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.sampling import Sampler, admission, edit, kept, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def drawn(count: int, **options: object) -> Counter[int]:
    """Tokens drawn from LOGITS by one request."""
    sampler = Sampler(len(LOGITS))
    sampling = Sampling(**{"seed": 5, **options})  # type: ignore[arg-type]
    sequence = scheduler.Sequence(0, [4, 4], 2, sampling, sampling.seed or 0, 99, slot=3)
    sampler.admit(admission(sequence))
    return Counter(int(sampler.choose(LOGITS[None], [3])[0, 0]) for _ in range(count))


def test_frequencies_are_the_softmax() -> None:
    counts = drawn(4000, temperature=0.7)
    for token, p in enumerate(torch.softmax(LOGITS / 0.7, -1).tolist()):
        assert counts[token] / 4000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 0}, {0}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 0.75}, {0, 1}),
        ({"min_p": 0.3}, {0, 1}),
        ({"logit_bias": {3: 100.0}}, {3}),
        ({"temperature": 0, "logit_bias": {0: -100.0}}, {1}),
    ],
)
def test_what_is_cut_off_is_never_drawn(options: dict[str, object], allowed: set[int]) -> None:
    assert set(drawn(300, **options)) == allowed


def test_penalties_count_what_was_said() -> None:
    assert len(drawn(5, temperature=0, presence_penalty=2.0)) > 1
    assert drawn(5, temperature=0, frequency_penalty=0.0) == {0: 5}
    assert set(drawn(12, temperature=0, frequency_penalty=2.0)) == {0, 1, 2, 3, 4}


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(len(LOGITS))
    for slot, logprobs in ((0, 2), (1, None)):
        sampling = Sampling(temperature=0.1, logprobs=logprobs)
        sampler.admit(admission(scheduler.Sequence(0, [1], 1, sampling, 1, 99, slot=slot)))
    result = sampler.choose(torch.stack([LOGITS, LOGITS]), [0, 1])
    expected = torch.log_softmax(LOGITS, -1)
    assert result[0, 1].item() == pytest.approx(expected[int(result[0, 0])].item(), abs=1e-6)
    assert result[0, 2:4].tolist() == [0, 1]
    assert result[0, 4:6].tolist() == pytest.approx(expected[:2].tolist(), abs=1e-6)
    assert result[1, 1:].isnan().all()


def test_uniform_depends_on_seed_and_position_alone() -> None:
    numbers = [uniform(1, i) for i in range(2000)]
    assert numbers == [uniform(1, i) for i in range(2000)]
    assert all(0 <= u < 1 for u in numbers)
    assert sum(numbers) / 2000 == pytest.approx(0.5, abs=0.03)
    assert uniform(-(1 << 63), 0) != uniform((1 << 63) - 1, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "temperature: needs a number from 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens: needs an integer from 1"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"seed": 1 << 70}, "seed"),
        ({"logit_bias": {1: 1000}}, r"logit_bias\[1\]"),
    ],
)
def test_bad_values_name_the_field(options: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        Sampling(**options)  # type: ignore[arg-type]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.2, 0.8, 1.0, 5.0]),
        "top_k": st.integers(0, 300),
        "top_p": st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]) | st.floats(0, 1),
        "min_p": st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        "logprobs": st.integers(0, 20),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "logit_bias": st.dictionaries(st.integers(0, 2000), st.sampled_from([-100.0, -1.0, 3.0]), max_size=3),
    },
)


def samplers(width: int, options: list[dict[str, object]]) -> list[Sampler]:
    """Two alike, with a request in a slot each."""
    made = [Sampler(width), Sampler(width)]
    for slot, options_of in enumerate(options):
        sampling = Sampling(**options_of)  # type: ignore[arg-type]
        told = admission(scheduler.Sequence(0, [slot % width, 0], 1, sampling, slot, 99, slot=slot))
        for sampler in made:
            sampler.admit(told)
    return made


@pytest.mark.skipif(kernels() is None, reason="no compiler")
@settings(max_examples=300, deadline=None)
@given(
    st.lists(OPTIONS, min_size=1, max_size=6), st.integers(1, 3000), st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_the_kernel_chooses_what_torch_chooses(
    options: list[dict[str, object]], width: int, dtype: torch.dtype, ties: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    logits_RV = 3 * torch.randn(len(options), width + 3)
    logits_RV = (logits_RV.round() if ties else logits_RV).to(dtype)[:, 3:]
    slots = list(range(len(options)))
    kernel, by_torch = samplers(width, options)
    strided_RV = logits_RV.t().contiguous().t()
    if width > 1 and len(options) > 1:
        assert kernel._native.can(logits_RV)
        assert not by_torch._native.can(strided_RV)
    for _ in range(3):
        edited = [edit(logits_V, by_torch._slots[r]) for r, logits_V in enumerate(logits_RV.float())]
        got, expected = kernel.choose(logits_RV, slots), by_torch.choose(strided_RV, slots)
        assert got.shape == expected.shape
        for r in slots:
            if got[r, 0] != expected[r, 0]:
                assert_as_good(int(got[r, 0]), edited[r], by_torch._slots[r].asked)
                return  # from here on their penalties differ
            torch.testing.assert_close(got[r], expected[r], atol=1e-5, rtol=1e-5, equal_nan=True)


def assert_as_good(token: int, edited_V: torch.Tensor, asked: Asked) -> None:
    """The largest logit, or the random number, is so near to another token that rounding decides."""
    if asked.temperature == 0:
        assert edited_V[token] == pytest.approx(edited_V.max(), abs=1e-5)
        return
    p_V = kept(edited_V, asked)
    at_V = p_V.cumsum(-1) / p_V.sum()
    begin, end = (at_V[token - 1].item() if token else 0.0), at_V[token].item()
    assert begin - 1e-5 <= asked.uniform <= end + 1e-5


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3000), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_the_likeliest_is_the_first_of_the_largest(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    logits_RV = torch.randint(-5, 5, (rows, width + 3)).to(dtype)[:, 3:]  # many are equal
    expected = [row.index(max(row)) for row in logits_RV.tolist()]
    sampler, _ = samplers(width, [{"temperature": 0}] * rows)
    for logits in (logits_RV, logits_RV.t().contiguous().t()):
        assert sampler.choose(logits, range(rows))[:, 0].tolist() == expected
