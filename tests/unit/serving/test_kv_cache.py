"""Attention over the paged cache against plain attention over the whole sequence."""

import random

import pytest
import torch

from nesa_ray.graph.attention import scaled_dot_product
from nesa_ray.serving.kv_cache import HeadShape, PagedAttention, StepContext
from nesa_ray.serving.native.attention import NativeAttention, NativeContext
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Sequence, Work
from nesa_ray.serving.step import Step, pack_step

KINDS = [PagedAttention, NativeAttention] if kernels() is not None else [PagedAttention]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window", "softcap"), [
    (4, 4, 16, 0, 0.0), (6, 2, 24, 0, 0.0), (4, 1, 64, 7, 0.0), (4, 2, 80, 0, 3.0), (4, 2, 16, 5, 2.0),
])  # fmt: skip
def test_any_schedule_equals_attention_over_the_whole_sequence(
    kind: type[PagedAttention],
    dtype: torch.dtype,
    size: int,
    heads: int,
    kv_heads: int,
    width: int,
    window: int,
    softcap: float,
) -> None:
    g = torch.Generator().manual_seed(heads * width)
    rng = random.Random(width)
    lengths = [23, 1, 40, 9]
    tables = rng.sample(range(40), 24)
    sequences, texts = [], []
    for i, length in enumerate(lengths):
        blocks = [tables.pop() for _ in range(-(-length // size))]
        sequences.append(Sequence(i, [0] * length, length, Sampling(), 0, 1, blocks=blocks, slot=i))
        q = torch.randn(1, heads, length, width, generator=g).to(dtype)
        k, v = (torch.randn(1, kv_heads, length, width, generator=g).to(dtype) for _ in range(2))
        texts.append((q, k, v))
    context = (NativeContext if kind is NativeAttention else StepContext)(size)
    cache = kind("a", HeadShape(heads, kv_heads, width, width), 40, context, dtype, torch.device("cpu"))
    got = [torch.zeros(1, heads, n, width, dtype=dtype) for n in lengths]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        work = []
        for i, s in enumerate(sequences):
            count = min(rng.choice([0, 1, 1, 3, 20]), lengths[i] - done[i])
            if count:
                work.append(Work(s, done[i], count, False))
        if not work:
            continue
        context.set(Step.unpack(pack_step(work, size)))
        flat = [
            torch.cat([texts[w.sequence.id][x][:, :, w.start : w.start + w.count] for w in work], 2) for x in range(3)
        ]
        out = cache(*flat, None, 0.3, True, window, softcap, 0.0)
        for w, part in zip(work, out.split([w.count for w in work], 2), strict=True):
            got[w.sequence.id][:, :, w.start : w.start + w.count] = part
            done[w.sequence.id] += w.count
    for (q, k, v), out in zip(texts, got, strict=True):
        expected = scaled_dot_product(q.float(), k.float(), v.float(), None, 0.3, True, window, softcap, 0.0)
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        assert torch.allclose(out.float(), expected, atol=tolerance * 4, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_cache_is_zeros_and_its_own(kind: type[PagedAttention], dtype: torch.dtype) -> None:
    context = (NativeContext if kind is NativeAttention else StepContext)(16)
    one, other = (kind("a", HeadShape(4, 2, 24, 40), 7, context, dtype, torch.device("cpu")) for _ in range(2))
    for cache in (one.k_BGDP, one.v_BGPE):
        assert cache.dtype == dtype
        assert not cache.any()
        cache.fill_(1)
        assert cache.all()
    assert one.k_BGDP.shape == (7, 2, 24, 16)
    assert one.v_BGPE.shape == (7, 2, 16, 40)
    assert not other.k_BGDP.any()
