"""The engine over pipelined stages against transformers' generate, token for token."""

import asyncio
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nesa_ray.errors import InvalidInput, Overloaded, RuntimeFailure, StageFailed
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.request import Sampling
from nesa_ray.serving.scheduler import Scheduler
from tests.unit.serving.conftest import MORE_FAMILIES, VOCABULARY, Model

Serve = Callable[..., Engine]


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))] for _ in range(count)]


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_greedy_equals_generate_alone_and_together(family: str, serve: Serve, model: Callable[[str], Model]) -> None:
    engine = serve(family, 0.3, 0.55)
    texts = prompts(6)
    lengths = [3 + 5 * i for i in range(len(texts))]
    expected = [tuple(model(family).generate(p, n)) for p, n in zip(texts, lengths, strict=True)]
    alone = engine.generate(texts[0], temperature=0, max_tokens=lengths[0])
    assert alone.token_ids == expected[0]
    assert alone.finish == "length"
    with ThreadPoolExecutor(len(texts)) as pool:
        together = pool.map(
            lambda p, n: engine.generate(p, temperature=0, max_tokens=n).token_ids, texts, lengths, timeout=60
        )
        assert list(together) == expected
    assert engine.stats()["free_blocks"] == engine.stats()["blocks"]


def together(engine: Engine, texts: list[list[int]], tokens: int, **options: object) -> list[tuple[int, ...]]:
    with ThreadPoolExecutor(len(texts)) as pool:
        work = [pool.submit(engine.generate, t, max_tokens=tokens, temperature=0, **options) for t in texts]
        return [w.result(timeout=60).token_ids for w in work]


def test_chunked_prompts_preemption_and_one_stage_change_nothing(serve: Serve, model: Callable[[str], Model]) -> None:
    texts = prompts(8, seed=1, low=10)
    expected = [tuple(model("llama").generate(t, 24)) for t in texts]
    block_bytes = 3 * 2 * 2 * 16 * 4 * 4
    for engine in (
        serve("llama", 0.5, max_batch_tokens=9, prefix_cache=False),
        serve("llama", 0.5, cache_bytes=30 * block_bytes, context=80, batches_in_flight=3),
        serve("llama", 0.0001),
    ):
        assert together(engine, texts, 24) == expected
        if engine.blueprint.blocks == 30:
            assert engine.scheduler.preemptions > 0
        assert engine.stats()["free_blocks"] == engine.blueprint.blocks


def test_a_prefix_is_computed_once(serve: Serve, model: Callable[[str], Model]) -> None:
    engine = serve("qwen3", 0.4)
    start = prompts(1, seed=2, low=30)[0]
    for end in ([], [1], [1, 2, 3, 4, 5], [9]):
        got = engine.generate([*start, *end], temperature=0, max_tokens=5)
        assert got.token_ids == tuple(model("qwen3").generate([*start, *end], 5))
    assert got.cached_tokens >= len(start) // 4 * 4
    assert got.prompt_tokens == len(start) + 1


def test_seeded_sampling_is_the_same_in_any_company(serve: Serve) -> None:
    engine = serve("gpt2")
    texts = prompts(6, seed=4)
    options = {"seed": 11, "top_p": 0.9, "max_tokens": 10}
    alone = [engine.generate(t, Sampling(**options)).token_ids for t in texts]  # type: ignore[arg-type]
    with ThreadPoolExecutor(6) as pool:
        crowd = list(pool.map(lambda t: engine.generate(t, Sampling(**options)).token_ids, texts))  # type: ignore[arg-type]
    assert crowd == alone
    assert engine.generate(texts[0], seed=12, max_tokens=10).token_ids != alone[0]


def test_logprobs_equal_those_of_a_full_forward_pass(serve: Serve, model: Callable[[str], Model]) -> None:
    text = prompts(1, seed=5)[0]
    got = serve("llama").generate(text, temperature=0.8, seed=3, max_tokens=6, logprobs=3)
    ids = torch.tensor([[*text, *got.token_ids]])
    with torch.no_grad():
        expected = torch.log_softmax(model("llama").reference(ids).logits[0, len(text) - 1 :], -1)
    for i, (token, one) in enumerate(zip(got.token_ids, got.logprobs, strict=True)):
        assert one.logprob == pytest.approx(expected[i, token].item(), abs=1e-4)
        assert [t for t, _ in one.top] == expected[i].topk(3).indices.tolist()


def test_an_end_token_ends_and_a_cancelled_request_frees_its_blocks(serve: Serve) -> None:
    engine = serve("llama")
    text = prompts(1, seed=6)[0]
    free = engine.generate(text, temperature=0, max_tokens=8)
    token = free.token_ids[3]
    ended = engine.generate(text, temperature=0, max_tokens=8, stop_token_ids=(token,))
    assert ended.finish == "stop"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1]

    async def leave_early() -> int:
        got = 0
        stream = engine.stream(text, temperature=0)
        async for _ in stream:
            got += 1
            if got == 3:
                stream.close()
        return got

    assert asyncio.run(leave_early()) == 3
    engine.generate(text, max_tokens=1)
    assert engine.stats()["running"] == 0
    assert engine.stats()["free_blocks"] == engine.blueprint.blocks


def test_what_was_begun_ahead_of_an_end_is_nobodys(
    serve: Serve, model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next takes the slot and the blocks while a step of the one that ended is still under way."""
    engine = serve("llama", 0.4, max_sequences=2)
    ahead: list[int] = []
    give = Scheduler._ahead
    monkeypatch.setattr(Scheduler, "_ahead", lambda self, most: (work := give(self, most), ahead.append(len(work)))[0])
    texts = prompts(12, seed=8)
    whole = [tuple(model("llama").generate(t, 16)) for t in texts]
    ends = [tokens[2 + i % 9] for i, tokens in enumerate(whole)]
    expected = [tokens[: tokens.index(e) + 1] for tokens, e in zip(whole, ends, strict=True)]
    for workers in (1, 3):
        with ThreadPoolExecutor(workers) as pool:
            got = pool.map(
                lambda t, e: engine.generate(t, temperature=0, max_tokens=16, stop_token_ids=(e,)).token_ids,
                texts, ends, timeout=60,
            )  # fmt: skip
            assert list(got) == expected
    assert sum(ahead) > 30
    assert engine.stats()["free_blocks"] == engine.blueprint.blocks


def test_too_long_too_many_and_malformed_prompts_are_refused(serve: Serve) -> None:
    engine = serve("llama", max_sequences=1, max_waiting=1)
    for prompt, says in (([], "empty"), ([VOCABULARY], "token ids"), ([1] * 256, "context"), ("text", "tokenizer")):
        with pytest.raises(InvalidInput, match=says):
            engine.generate(prompt)  # type: ignore[arg-type]
    gate = threading.Event()
    hold = [engine.submit([1, 2], Sampling(), lambda _: gate.wait(30) and None) for _ in range(2)]
    with pytest.raises(Overloaded):
        engine.generate([1])
    for request in hold:
        engine.cancel(request)
    gate.set()


def test_a_failing_stage_and_a_lost_one_end_every_request_with_a_clear_error(serve: Serve) -> None:
    engine = serve("llama")
    engine._stages.workers[1]._context.set = None  # type: ignore[attr-defined]
    with pytest.raises(StageFailed, match="stage 1: TypeError"):
        engine.generate([1, 2, 3])
    with pytest.raises(StageFailed):
        engine.generate([1])
    lost = serve("llama")
    lost._stages._channels["stage0"].close()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeFailure, match="stage0"):  # whoever hears of it first
        lost.generate([1, 2, 3], timeout_s=30)
    lost.close()
    with pytest.raises(RuntimeFailure):
        lost.check_health()
