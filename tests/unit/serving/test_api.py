"""The HTTP application, through OpenAI's own client, over stages in this process."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import openai
import pytest
import torch
from starlette.testclient import TestClient

from nesa_ray.graph.capture import Captured
from nesa_ray.serving.api import application
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.stream import affordable_pieces_per_s
from tests.unit.serving.conftest import Model, byte_tokenizer, start


@pytest.fixture(scope="module")
def engine(model: Callable[[str], Model], captured: Callable[[ServeConfig], Captured]) -> Iterator[Engine]:
    with start(model("qwen3"), captured, name="tiny", max_waiting=2, max_sequences=2) as running:
        yield running


@pytest.fixture
def http(engine: Engine) -> TestClient:
    return TestClient(application(lambda: engine, engine.config), raise_server_exceptions=False)


@pytest.fixture
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


def test_completions_equal_generate_streamed_or_not(client: openai.OpenAI, model: Callable[[str], Model]) -> None:
    tokenizer = byte_tokenizer()
    expected = tokenizer.decode(model("qwen3").generate(tokenizer.encode("The cat"), 12))
    done = client.completions.create(model="tiny", prompt="The cat", max_tokens=12, temperature=0)
    assert done.choices[0].text == expected
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (7, 12)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="The cat",
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"


def test_chunks_are_ten_times_as_many_where_each_costs_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    own = affordable_pieces_per_s()
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert affordable_pieces_per_s() == 10 * own


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_streams_tokens_come_together_where_chunks_are_limited(
    engine: Engine, model: Callable[[str], Model], outputs: int
) -> None:
    """The first comes at once, the others with the last, which doesn't wait for its turn."""
    app = application(lambda: engine, replace(engine.config, stream_chunks_per_s=outputs / 60))
    http = TestClient(app, raise_server_exceptions=False)
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
    options = {"model": "tiny", "prompt": "The cat", "max_tokens": 12, "temperature": 0, "n": outputs}
    whole = client.completions.create(**options)
    for _ in range(2):  # streams that have ended count no more
        began = time.monotonic()
        chunks = list(client.completions.create(**options, stream=True, extra_body={"return_token_ids": True}))
        assert time.monotonic() - began < 30
        for index in range(outputs):
            mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
            assert len(mine) <= 2
            assert sum(len(c.token_ids) for c in mine) == 12
            assert "".join(c.text for c in mine) == whole.choices[index].text
            assert mine[-1].finish_reason == "length"


def test_chat_goes_through_the_template(client: openai.OpenAI, model: Callable[[str], Model]) -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    expected = tokenizer.decode(model("qwen3").generate(tokenizer.encode("<user>Hi<bot>"), 9))
    options = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    done = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert done.choices[0].message.content == expected
    assert len(done.choices[0].logprobs.content) == 9
    assert done.choices[0].logprobs.content[0].top_logprobs[0].logprob == done.choices[0].logprobs.content[0].logprob
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[0].choices[0].delta.role == "assistant"


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    done = client.completions.create(model="tiny", prompt=[[7, 8], [3, 4, 5]], n=2, max_tokens=4, seed=1)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    assert done.usage.prompt_tokens == 5
    assert done.choices[0].text != done.choices[1].text
    again = client.completions.create(model="tiny", prompt=[[7, 8], [3, 4, 5]], n=2, max_tokens=4, seed=1)
    assert [c.text for c in again.choices] == [c.text for c in done.choices]


def test_stop_echo_and_logprobs(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="abc", max_tokens=20, temperature=0, logprobs=2)
    text = free.choices[0].text
    assert len(free.choices[0].logprobs.top_logprobs[0]) <= 2
    stop = text[3:5]
    ended = client.completions.create(model="tiny", prompt="abc", max_tokens=20, temperature=0, stop=stop, echo=True)
    assert ended.choices[0].text == "abc" + text[: text.index(stop)]
    assert ended.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "temperature": "1"}, 400, "temperature"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1 << 60}, 400, "max_tokens"),
        ({"prompt": "a" * 256}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [5000]}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, None),
        ({"prompt": "a", "n": 1000}, 400, "n"),
        ({"prompt": ["a"] * 200, "n": 2}, 400, "n"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias.x"),
        ({"prompt": "a", "stop": ["", "b"]}, 400, "stop"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens"),
        ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}, 400, "logit_bias"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({}, 400, "prompt"),
    ],
)
def test_bad_input_is_the_clients_error(http: TestClient, body: dict, status: int, param: str | None) -> None:
    answer = http.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"{",
        b"",
        b"[]",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_bodies_that_are_no_request(http: TestClient, content: bytes) -> None:
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_told_both_lengths(http: TestClient) -> None:
    for prompt, tokens in (("a" * 300, 300), ([7] * 300, 300), ("long " * 20_000, 100_000)):
        error = http.post("/v1/completions", json={"prompt": prompt}).json()["error"]
        assert error["message"].startswith(f"prompt: has {tokens} tokens; the context of 256 tokens")
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_a_chat_template_is_the_models_not_the_clients(http: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs"


def test_other_routes_methods_and_sizes(http: TestClient) -> None:
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/v1/models/none").status_code == 404
    too_large = b"x" * ((4 << 20) + 1)
    for content in (too_large, iter([too_large])):  # the second has no declared length
        answer = http.post("/v1/completions", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == f"body: at most {4 << 20} bytes, got {len(too_large)}"


def test_more_requests_than_the_engine_takes_are_told_to_come_again(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as e:
        client.completions.create(model="tiny", prompt=["a"] * 5, max_tokens=100)
    assert e.value.response.headers["retry-after"] == "1"
    for _ in range(200):
        try:
            done = client.completions.create(model="tiny", prompt=["a"] * 4, max_tokens=2)
            break
        except openai.RateLimitError:  # the refused ones' first four are being cancelled
            time.sleep(0.02)
    assert len(done.choices) == 4


def test_a_stream_that_breaks_says_so(serve: Callable[..., Engine]) -> None:
    engine = serve("qwen3", name="tiny")
    http = TestClient(application(lambda: engine, engine.config))
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
    engine._stages.workers[0]._module = lambda *_: torch.zeros(1)
    with pytest.raises(openai.APIError, match="stage 0"):
        list(client.completions.create(model="tiny", prompt="a", stream=True))
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="a")
