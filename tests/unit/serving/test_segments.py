"""Segments against the same instructions one by one: the same bits."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nesa_ray.runtime.channel import LocalChannel
from nesa_ray.serving import stage
from nesa_ray.serving.blueprint import capture_served, draw
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.native import attention
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.kernel import Kernel
from nesa_ray.serving.native.products import packs
from nesa_ray.serving.native.tape import Affine, NotPlayable
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Sequence, Work
from nesa_ray.serving.segments import RECORDED, Segment, divide
from nesa_ray.serving.stage import StageWorker
from nesa_ray.serving.step import pack_step
from tests.unit.serving.conftest import MORE_FAMILIES, Model, cut

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiler")
ONE_CALL = ("llama", "mistral", "qwen3")  # whose layers are all kernels that there are
BLOCK = 4
LONG = 17


def segments(worker: StageWorker) -> list[Segment]:
    """Of the worker's module."""
    return [f for f in worker._module._run.__globals__.values() if isinstance(f, Segment)]


def step(sequences: list[Sequence], counts: list[int]) -> torch.Tensor:
    """The message of so many tokens more of each sequence."""
    work = [Work(s, s.scheduled, n, True) for s, n in zip(sequences, counts, strict=True) if n]
    message = pack_step(work, BLOCK)
    for w in work:
        w.sequence.scheduled += w.count
    return message


def recorded(sequences: list[Sequence], tokens: int, count: int) -> torch.Tensor:
    """The message of a step that is recorded."""
    return step(sequences[:count], [1 + (i < tokens - count) for i in range(count)])


def new(count: int, blocks: int) -> list[Sequence]:
    """Sequences with blocks of their own and tokens that are their own."""
    rng = random.Random(1)
    return [
        Sequence(
            i, [rng.randrange(320) for _ in range(blocks * BLOCK)], 1, Sampling(), 0, 1,
            blocks=list(range(i * blocks, (i + 1) * blocks)), slot=i,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_played_segments_give_the_same_bits(
    family: str, dtype: str, weights: str, model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(
        model=str(model(family).directory), dtype=dtype, weights=weights, block_size=BLOCK, cache_bytes=1 << 20
    )
    captured = capture_served(config)
    (spec,) = draw(config, captured, replace(cut(captured))).specs
    logits: list[torch.Tensor] = []
    monkeypatch.setattr(StageWorker, "_sample", lambda self, index, logits_RV, step: logits.append(logits_RV.clone()))
    played = spec.worker(LocalChannel("a", {}), {})
    with monkeypatch.context() as m:
        m.setattr(stage, "gather", lambda program: (program, {}))
        plain = spec.worker(LocalChannel("b", {}), {})
    assert not segments(plain)
    rng = random.Random(2)
    monkeypatch.setattr(attention, "FEW", LONG * LONG - 1)
    sequences = new(10, 10)
    messages = [recorded(sequences, *of) for of in RECORDED]
    for s in sequences:
        s.scheduled = 0
    for i in range(12):  # few tokens of some, several of one, and once so many of one that torch attends
        counts = [rng.choice([0, 1, 1, 2]) for _ in sequences]
        if i == 3:
            counts[0] = LONG
        if i > 3:
            counts[1 + i % 2] += rng.choice([0, 2, 4])
        messages.append(step(sequences, counts if any(counts) else [1] * 10))
    got: list[list[torch.Tensor]] = []
    with torch.inference_mode():
        for worker in (played, plain):
            logits.clear()
            for i, message in enumerate(messages):
                worker._compute(i, message)
            got.append(list(logits))
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)
    if family in ONE_CALL and (weights == "int8" or packs(getattr(torch, dtype))):
        found = segments(played)
        assert found
        assert all(s.plays for s in found)
        assert len(played._module.program.instructions) < 30


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_what_isnt_awaited_is_computed_before(family: str, model: Callable[[str], Model]) -> None:
    config = ServeConfig(model=str(model(family).directory), block_size=BLOCK, cache_bytes=1 << 20)
    captured = capture_served(config)
    for spec in draw(config, captured, cut(captured, 0.4)).specs:
        program, awaited = spec.program, {spec.tokens, *spec.program.receives}
        before, behind = divide(program, awaited)
        assert awaited.isdisjoint(before.arguments)
        assert {s.name for s in (*before.instructions, *behind.instructions)} == {s.name for s in program.instructions}
        made = {s.name for s in before.instructions}
        assert all(awaited & set(s.reads) or set(s.reads) - made - {*program.inputs} for s in behind.instructions)
        assert set(behind.arguments) <= {*program.inputs, *program.receives, *before.results}
        assert (behind.returns, behind.sends, behind.receives) == (program.returns, program.sends, program.receives)


def test_once_recorded_a_segment_is_one_call(model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs(torch.float32):
        pytest.skip("oneDNN's products are the faster ones here")
    config = ServeConfig(model=str(model("llama").directory), block_size=BLOCK, cache_bytes=1 << 20)
    captured = capture_served(config)
    (spec,) = draw(config, captured, cut(captured)).specs
    monkeypatch.setattr(StageWorker, "_sample", lambda *_: None)
    worker = spec.worker(LocalChannel("a", {}), {})
    sequences = new(10, 10)
    called: list[Kernel] = []
    call = Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda self: (called.append(self), call(self))[1])
    with torch.inference_mode():
        for i, of in enumerate(RECORDED):
            worker._compute(i, recorded(sequences, *of))
        before = len(called)
        worker._compute(3, step(sequences, [1] * 10))
        worker._compute(4, step(sequences[:1], [1]))
    assert before > 20 * len(RECORDED)
    assert len(called) == before


def test_what_isnt_proportional_to_tokens_and_rows_isnt_played() -> None:
    sizes = [(5, 3), (7, 6), (9, 5), (8, 4)]
    assert Affine.through([(of, 3 + 2 * of[0] + 7 * of[1]) for of in sizes]) == Affine(3, 2, 7)
    for values in ((34, 59, 56, 48), (0, 1, 0, 0), [t * r for t, r in sizes]):
        with pytest.raises(NotPlayable):
            Affine.through(list(zip(sizes, values, strict=True)))
    with pytest.raises(NotPlayable):
        Affine.through([((n, n), n) for n in (3, 4, 5, 6)])
