"""What an endpoint tells of itself: /metrics, /status, /health."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from nesa_ray.errors import RuntimeFailure
from nesa_ray.serving.api import application
from nesa_ray.serving.engine import Engine

Serve = Callable[..., Engine]


def read(http: TestClient) -> dict[str, float]:
    """Every sample of /metrics by name and labels, less the model's."""
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.labels.pop("model") == "tiny"
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name.removeprefix('nesa_serve_')}{{{labels}}}" if labels else sample.name[11:]] = (
                sample.value
            )
    return found


def test_requests_tokens_times_and_loads_are_counted(serve: Serve) -> None:
    engine = serve("qwen3", name="tiny", max_waiting=2, max_sequences=2)
    http = TestClient(application(lambda: engine, engine.config))
    for _ in range(2):
        http.post("/v1/completions", json={"prompt": "abcdefgh", "max_tokens": 5, "ignore_eos": True})
    http.post("/v1/completions", json={"prompt": ["a"] * 5})
    http.post("/nothing/of/the/sort")
    time.sleep(0.5)
    seen = read(http)
    assert seen["output_tokens_total"] == 10
    assert seen["cached_prompt_tokens_total"] == 4
    assert seen["requests_total{finish=length}"] == 2
    assert seen["time_to_first_token_s_count"] == seen["time_per_output_token_s_count"] == 2
    assert seen["time_to_first_token_s_sum"] + 4 * seen["time_per_output_token_s_sum"] == pytest.approx(
        seen["request_s_sum"], rel=0.9
    )
    assert seen["http_requests_total{route=/v1/completions,status=200}"] == 2
    assert seen["http_requests_total{route=/v1/completions,status=429}"] == 1
    assert seen["http_requests_total{route=none,status=404}"] == 1
    assert seen["cache_blocks"] == engine.blueprint.blocks
    assert 0 < seen["stage_load{stage=0}"] <= 1


def test_what_runs_and_waits_is_seen_while_it_does(serve: Serve) -> None:
    engine = serve("qwen3", name="tiny", max_sequences=2)
    http = TestClient(application(lambda: engine, engine.config))
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(
            http.post, "/v1/completions", json={"prompt": "a", "max_tokens": 250, "n": 4, "ignore_eos": True}
        )
        end = time.monotonic() + 10
        while (now := http.get("/status").json())["waiting"] < 2:
            assert time.monotonic() < end
        assert now["running"] == 2
        assert now["cache_blocks_used"] > 0
        assert now["state"] == "ready"
        assert done.result(20).status_code == 200
    assert http.get("/status").json()["output_tokens"] == 1000


def test_health_tells_ready_draining_and_failed(serve: Serve) -> None:
    engine = serve("qwen3", name="tiny")
    http = TestClient(application(lambda: engine, engine.config))
    assert http.get("/health").json() == {"status": "ready", "live": True, "ready": True}
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(engine.generate, "a", max_tokens=200, ignore_eos=True)
        while not engine.stats()["running"]:
            time.sleep(0.001)
        assert not engine.drain(0.0)
        answer = http.get("/health")
        assert answer.status_code == 503
        assert (answer.json()["status"], answer.json()["live"], answer.json()["ready"]) == ("draining", True, False)
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert "about to be stopped" in refused.json()["error"]["message"]
        assert len(under_way.result(20).token_ids) == 200  # what was begun is ended
    assert engine.drain(5.0)
    engine.close()
    gone = http.get("/health").json()
    assert (gone["status"], gone["live"], gone["error"]["message"]) == ("failed", False, "engine: closed")
    assert http.get("/metrics").status_code == 200
    with pytest.raises(RuntimeFailure):
        engine.generate("a")
