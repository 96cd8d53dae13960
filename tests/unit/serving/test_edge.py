"""What the application refuses, ends and survives: over real sockets where the socket matters."""

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from starlette.testclient import TestClient

from nesa_ray.errors import InvalidConfig
from nesa_ray.serving.api import application
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.engine import Engine
from nesa_ray.serving.keys import ApiKeys
from tests.unit.serving.conftest import listening

Serve = Callable[..., Engine]


def request(**body: object) -> bytes:
    """A POST of a body, whole."""
    return begun(json.dumps(body).encode(), 0)


def begun(content: bytes, missing: int) -> bytes:
    """A POST of which so many bytes are still to come."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(content) + missing}\r\n\r\n".encode() + content


def until(condition: Callable[[], bool], max_seconds: float = 10.0) -> None:
    end = time.monotonic() + max_seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_idle(engine: Engine) -> bool:
    stats = engine.stats()
    return stats["running"] == stats["waiting"] == 0 and stats["free_blocks"] == stats["blocks"]


def test_only_requests_with_a_key_are_let_in(serve: Serve) -> None:
    engine = serve("qwen3", name="tiny", api_keys=["first-key", "second-key"])
    http = TestClient(application(lambda: engine, engine.config))

    def ask(key: str) -> openai.types.Completion:
        client = openai.OpenAI(base_url="http://testserver/v1", api_key=key, http_client=http, max_retries=0)
        return client.completions.create(model="tiny", prompt="a", max_tokens=1)

    assert ask("second-key").usage
    for wrong in ("first-ke", "none"):
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as e:
            ask(wrong)
        assert e.value.code == "invalid_api_key"
        assert e.value.response.headers["www-authenticate"] == "Bearer"
    assert http.get("/v1/models").status_code == 401
    assert http.get("/v1/models", headers={"Authorization": "Basic first-key"}).status_code == 401
    assert http.get("/health").status_code == 200
    assert "first-key" not in repr(engine.config)


def test_keys_are_read_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    (tmp_path / "serve.yaml").write_text("model: m\napi_keys: keys\n")
    monkeypatch.setenv("KEYS", "three,four")
    of_file = ApiKeys.of(ServeConfig.from_yaml(tmp_path / "serve.yaml"))
    of_environment = ApiKeys.of(ServeConfig(model="m", api_keys="env:KEYS"))
    assert of_file.allow(b"Bearer two")
    assert of_environment.allow(b"bearer four")
    assert not any(of_environment.allow(h) for h in (b"Bearer two", b"Bearer \xff", b"three", b""))
    for place, says in (("env:NONE", "variable NONE holds no key"), (str(tmp_path / "none"), "can't be read")):
        with pytest.raises(InvalidConfig, match=says):
            ApiKeys.of(ServeConfig(model="m", api_keys=place))


def test_a_request_whose_time_is_over_is_ended(serve: Serve) -> None:
    engine = serve("qwen3", name="tiny", request_timeout_s=0.3)
    gate = threading.Event()
    engine._stages.workers[0]._compute = lambda *_: gate.wait(60)  # type: ignore[attr-defined]
    with TestClient(application(lambda: engine, engine.config)) as http:
        late = http.post("/v1/completions", json={"prompt": "a"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        stream = http.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert stream.status_code == 200
        assert json.loads(stream.text.removeprefix("data: "))["error"]["message"] == "not done within 0.3 s"
        until(lambda: is_idle(engine))
    gate.set()


def test_a_client_that_leaves_frees_its_blocks_at_once(serve: Serve) -> None:
    engine = serve("qwen3", max_sequences=2)
    with listening(engine) as port:
        for stream in (True, False):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(request(prompt="a", max_tokens=250, n=8, stream=stream, ignore_eos=True))
                until(lambda: engine.stats()["running"] == 2)
            until(lambda: is_idle(engine), max_seconds=0.5)


def test_slow_readers_and_idle_connections_dont_stand_in_the_way(serve: Serve) -> None:
    engine = serve("qwen3", name="tiny", request_timeout_s=20.0)
    slow: list[socket.socket] = []
    try:
        with listening(engine) as port:
            for _ in range(4):  # they ask for 3 MB of text, and read none
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", port))
                client.sendall(request(prompt="a", max_tokens=250, n=2, stream=True, logprobs=20, ignore_eos=True))
                slow.append(client)
            for _ in range(1000):
                client = socket.create_connection(("127.0.0.1", port))
                client.sendall(begun(b"{", missing=9))
                slow.append(client)
            api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=20)
            for _ in range(3):
                assert api.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2
            until(lambda: is_idle(engine))  # what a slow reader asked for is done, and holds no block
    finally:
        for client in slow:
            client.close()


def test_a_body_that_comes_too_slowly_is_refused(serve: Serve) -> None:
    engine = serve("qwen3", request_timeout_s=0.2)
    with listening(engine) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(begun(b"{", missing=9))
        client.settimeout(10)
        answer = client.recv(65536)
        while b"body: not received within 0.2 s" not in answer:
            more = client.recv(65536)
            assert more, answer
            answer += more
        assert answer.startswith(b"HTTP/1.1 408")
