"""Embeddings equal the hidden states that transformers gives, pooled."""

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from starlette.testclient import TestClient

from nesa_ray.errors import InvalidConfig, InvalidInput
from nesa_ray.serving.api import application
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.pooling import Pooling, pooling_of
from tests.unit.serving.conftest import VOCABULARY, Model

Serve = Callable[..., Engine]


def expected(model: Model, tokens: list[int], mode: str) -> torch.Tensor:
    with torch.no_grad():
        hidden_TD = model.reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    return hidden_TD.mean(0) if mode == "mean" else hidden_TD[-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_embeddings_equal_the_pooled_hidden_states(family: str, serve: Serve, model: Callable[[str], Model]) -> None:
    rng = random.Random(1)
    texts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (1, 2, 17, 40, 41)]
    texts.append(texts[-1])  # the second time its start is cached
    for mode, shares in (("mean", (0.3, 0.6)), ("last", (0.97,))):
        engine = serve(family, *shares, pooling=mode, max_batch_tokens=16, max_sequences=4)
        with ThreadPoolExecutor(len(texts) + 2) as pool:
            company = [pool.submit(engine.generate, t, temperature=0, max_tokens=8) for t in texts[2:4]]
            vectors = list(pool.map(engine.embed, texts))
        for text, vector in zip(texts, vectors, strict=True):
            torch.testing.assert_close(vector, expected(model(family), text, mode), atol=1e-4, rtol=1e-4)
        for text, one in zip(texts[2:4], company, strict=True):
            assert list(one.result().token_ids) == model(family).generate(text, 8)
        assert engine.stats()["free_blocks"] == engine.blueprint.blocks


def test_a_text_may_fill_the_context_and_give_up_its_blocks(serve: Serve, model: Callable[[str], Model]) -> None:
    engine = serve("llama", context=48, cache_bytes=20 * 3 * 2 * 2 * 16 * 4 * 4, max_batch_tokens=8)
    texts = [[i % VOCABULARY for i in range(start, start + 48)] for start in range(4)]
    with ThreadPoolExecutor(8) as pool:
        company = [pool.submit(engine.generate, t[:4], max_tokens=40, ignore_eos=True) for t in texts]
        vectors = list(pool.map(engine.embed, texts))
    for text, vector in zip(texts, vectors, strict=True):
        torch.testing.assert_close(vector, expected(model("llama"), text, "mean"), atol=1e-4, rtol=1e-4)
    assert all(len(c.result().token_ids) == 40 for c in company)
    with pytest.raises(InvalidInput, match="49 tokens"):
        engine.embed([1] * 49)


def test_the_endpoint_gives_numbers_or_base64(serve: Serve) -> None:
    engine = serve("qwen3", name="tiny")
    http = TestClient(application(lambda: engine, engine.config))
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
    got = client.embeddings.create(model="tiny", input=["The cat", "sat"])  # the client asks for base64 by itself
    assert [d.index for d in got.data] == [0, 1]
    assert (got.usage.prompt_tokens, got.usage.total_tokens) == (10, 10)
    np.testing.assert_allclose(got.data[1].embedding, engine.embed("sat"), atol=1e-5)
    plain = client.embeddings.create(model="tiny", input="sat", encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, engine.embed("sat"), atol=1e-5)
    for wrong, param in (({"input": []}, "input"), ({"input": "a", "dimensions": 3}, "dimensions")):
        with pytest.raises(openai.BadRequestError) as e:
            client.embeddings.create(model="tiny", **wrong)
        assert e.value.param == param
    without = serve("qwen3", name="tiny", pooling="none")
    answer = TestClient(application(lambda: without, without.config)).post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "model: 'tiny' has no embeddings here"


def test_sentence_transformers_files_say_how(tmp_path: Path) -> None:
    assert pooling_of(tmp_path, None) == Pooling("mean")
    assert pooling_of(tmp_path, "none") is None
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Normalize"}]))
    assert pooling_of(tmp_path, None) == Pooling("last", normalise=True)
    assert pooling_of(tmp_path, "mean") == Pooling("mean", normalise=True)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(InvalidConfig, match="pooling_mode_cls_token"):
        pooling_of(tmp_path, None)
