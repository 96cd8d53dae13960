"""Serving on the cluster: the engine on placed actors, and the application by the real commands and OpenAI's client."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import peft
import pytest
import ray
import torch
import yaml
from ray import serve
from ray.util.state import list_actors
from transformers import AutoModelForCausalLM, LlamaConfig

import nesa_ray as nr
from nesa_ray.cluster.local import LocalCluster, LocalNode, free_ports
from nesa_ray.cluster.probe import live_nodes
from nesa_ray.errors import Infeasible, RuntimeFailure
from nesa_ray.planning.plan import Plan, Stage
from nesa_ray.serving.blueprint import capture_served
from tests.unit.serving.conftest import byte_tokenizer, cut
from tests.unit.serving.test_adapters import save_trained

REPOSITORY = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "ray.serve.scripts"]
PROMPT = "def main():"


def save_served(path: Path, *replicas: tuple[str, str]) -> Path:
    """A tiny model with a tokenizer, a plan of two stages for each replica's devices, and its serve.yaml."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    served = nr.ServeConfig(model=str(path / "model"))
    plan = cut(capture_served(served), 0.6)
    for replica, devices in enumerate(replicas):
        stages = tuple(Stage(id=s.id, devices=(d,), nodes=s.nodes) for s, d in zip(plan.stages, devices, strict=True))
        Plan(objective="throughput", stages=stages, bottleneck_s=0.0, latency_s=0.0, lower_bound_s=0.0).to_json(
            path / f"plan{replica}.json"
        )
    (path / "serve.yaml").write_text(yaml.safe_dump({"model": "model", "plan": "plan{replica}.json", "name": "tiny"}))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its plans cross nodes."""
    return save_served(tmp_path_factory.mktemp("served"), ("small/cpu1", "big/cpu0"), ("small/cpu0", "big/cpu1"))


def expected(directory: Path, tokens: int) -> list[int]:
    """What transformers generates greedily."""
    reference = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    ids = torch.tensor([byte_tokenizer().encode(PROMPT)])
    out = reference.generate(ids, max_new_tokens=tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_an_engine_on_placed_actors_equals_generate(cluster: LocalCluster, directory: Path) -> None:
    with nr.Engine(nr.ServeConfig.from_yaml(directory / "serve.yaml")) as engine:

        def steps() -> list[int]:  # a stage counts its step just after the tokens have gone
            return [int(s["steps"]) for s in engine.stats()["stages"]]

        until("the stages have computed different steps", lambda: len(set(steps())) == 1)
        warm = steps()
        got = engine.generate(PROMPT, temperature=0, max_tokens=16)
        assert list(got.token_ids) == expected(directory, 16)
        nodes = live_nodes()
        where = engine._stages.where()  # type: ignore[attr-defined]
        assert where[0, 0]["node_id"] == nodes["small"]["NodeID"]
        assert where[1, 0]["node_id"] == nodes["big"]["NodeID"]
        until("there weren't 16 steps", lambda: steps() == [n + 16 for n in warm], max_seconds=10)


def test_adapters_on_placed_actors_equal_pefts(cluster: LocalCluster, directory: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    save_trained(base, tmp_path / "sql", ("q_proj", "down_proj", "lm_head"), 4)
    ids = torch.tensor([byte_tokenizer().encode(PROMPT)])
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "sql").eval()
    tokens = adapted.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    config = nr.ServeConfig.from_yaml(directory / "serve.yaml", adapters={"sql": str(tmp_path / "sql")})
    with nr.Engine(config) as engine, ThreadPoolExecutor(2) as pool:
        work = [pool.submit(engine.generate, PROMPT, model=m, temperature=0, max_tokens=8) for m in ("sql", "tiny")]
        assert [list(w.result(60).token_ids) for w in work] == [tokens, expected(directory, 8)]
    assert tokens != expected(directory, 8)


def test_without_a_plan_the_live_cluster_is_probed(cluster: LocalCluster, directory: Path) -> None:
    config = nr.ServeConfig(model=str(directory / "model"), stages=3)
    with nr.Engine(config) as engine:
        assert len(engine.blueprint.plan.stages) == 3
        assert list(engine.generate(PROMPT, temperature=0, max_tokens=5).token_ids) == expected(directory, 5)
    with pytest.raises(Infeasible, match="the cluster has 4"):
        nr.Engine(nr.ServeConfig(model=str(directory / "model"), stages=5))


def test_a_killed_stage_ends_the_requests_with_its_name(cluster: LocalCluster, directory: Path) -> None:
    engine = nr.Engine(nr.ServeConfig.from_yaml(directory / "serve.yaml"))
    try:
        pid = engine._stages.where()[1, 0]["pid"]  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeFailure, match="stage1/0"):
            engine.generate(PROMPT, max_tokens=200, timeout_s=30)
    finally:
        engine.close()
    assert len(live_nodes()) == 2  # the cluster itself goes on


def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def wait_until_healthy(port: int, process: "subprocess.Popen[str] | None" = None, max_seconds: float = 120.0) -> None:
    end = time.monotonic() + max_seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.HTTPError):
            pass
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the application didn't come up"
        time.sleep(0.3)


def check_endpoint(port: int, directory: Path) -> None:
    """Whole and streamed completions equal generate; errors are OpenAI's."""
    text = byte_tokenizer().decode(expected(directory, 12))
    api = client(port)
    assert [m.id for m in api.models.list()] == ["tiny"]
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    assert api.completions.create(**options).choices[0].text == text
    assert "".join(c.choices[0].text for c in api.completions.create(**options, stream=True)) == text
    chat = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    assert chat.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        api.completions.create(**{**options, "max_tokens": 100_000})
    with pytest.raises(openai.NotFoundError):
        api.completions.create(**{**options, "model": "other"})


@pytest.fixture
def port(cluster: LocalCluster) -> Iterator[int]:
    """A free port; Serve is shut down afterwards."""
    yield free_ports(1)[0]
    serve.shutdown()


def check_all_is_free(max_seconds: float = 30.0) -> None:
    """The stages have gone with the application."""
    end = time.monotonic() + max_seconds
    while (free := ray.available_resources().get("CPU", 0.0)) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < end, f"{free} CPUs are free"
        time.sleep(0.2)


def test_serve_run(cluster: LocalCluster, directory: Path, port: int) -> None:
    # The nodes of a local cluster share this machine's ports: one proxy.  `serve run` has no option for the port.
    start = [*SERVE, "start", "--http-host", "127.0.0.1", "--http-port", str(port), "--proxy-location", "HeadOnly"]
    subprocess.run(start, check=True, timeout=120)
    command = [*SERVE, "run", "serve_apps.llm:build", f"config={directory / 'serve.yaml'}", "max_sequences=8"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until_healthy(port, process)
        check_endpoint(port, directory)
        check_many_connections(port, directory)
        check_metrics(port)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    check_all_is_free()


def check_many_connections(port: int, directory: Path) -> None:
    """A thousand connections that ask for nothing, or for half of something, keep nobody else from being served."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\n{"
    with contextlib.ExitStack() as open_ones:
        for i in range(1000):
            one = open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            if i % 10 == 0:
                one.sendall(head)
        check_endpoint(port, directory)


def check_metrics(port: int) -> None:
    """The endpoint tells its metrics, and Ray's exporter has them too."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'nesa_serve_stage_load{model="tiny",stage="1"}' in text
    end = time.monotonic() + 20
    exporters = [
        f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in ray.nodes() if n["Alive"]
    ]
    while True:
        told = []
        for address in exporters:
            with urllib.request.urlopen(address, timeout=10) as answer:
                told += answer.read().decode().splitlines()
        if any(x.startswith("ray_nesa_serve_output_tokens") and 'model="tiny"' in x for x in told):
            return
        assert time.monotonic() < end, "Ray's exporters don't have the endpoint's metrics"
        time.sleep(0.5)


class Load:
    """Clients that go on asking until they are told to stop; each answer has to be the right one, and whole."""

    def __init__(self, port: int, text: str, tokens: int) -> None:
        self._port, self._text, self._tokens = port, text, tokens
        self._over = threading.Event()
        self.answers = 0
        self._pool = ThreadPoolExecutor(2)
        self._clients = [self._pool.submit(self._ask, stream) for stream in (True, False)]

    def _ask(self, stream: bool) -> None:
        api = client(self._port)
        options = {"model": "tiny", "prompt": PROMPT, "max_tokens": self._tokens, "temperature": 0}
        while not self._over.is_set():
            if stream:
                text = "".join(c.choices[0].text for c in api.completions.create(**options, stream=True))
            else:
                text = api.completions.create(**options).choices[0].text
            assert text == self._text
            self.answers += 1
            time.sleep(0.1)  # the new version has to start on the same two cores

    def stop(self) -> None:
        self._over.set()
        for one in self._clients:
            one.result(60)
        self._pool.shutdown()


def until(what: str, condition: Callable[[], bool], max_seconds: float = 90.0) -> None:
    end = time.monotonic() + max_seconds
    while True:
        with contextlib.suppress(openai.APIError, OSError):
            if condition():
                return
        assert time.monotonic() < end, what
        time.sleep(0.3)


def running_replicas() -> int:
    application = serve.status().applications["llm"]
    states = application.deployments["LLM"].replica_states if application.status == "RUNNING" else {}
    return states.get("RUNNING", 0) if sum(states.values()) <= 2 else 0  # more: the old version's aren't gone yet


def deploy(directory: Path, port: int, **args: object) -> None:
    deployed = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "llm",
                "route_prefix": "/",
                "import_path": "serve_apps.llm:build",
                "args": {"config": str(directory / "serve.yaml"), "max_sequences": 8, **args},
                "runtime_env": {"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
            }
        ],
    }
    (directory / "deploy.yaml").write_text(yaml.safe_dump(deployed))
    subprocess.run([*SERVE, "deploy", str(directory / "deploy.yaml")], check=True, cwd=directory, timeout=120)


def context(port: int) -> int:
    """That of the version that answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=10) as answer:
        return int(json.load(answer)["context"])


def test_serve_deploy(cluster: LocalCluster, directory: Path, port: int) -> None:
    deploy(directory, port)
    wait_until_healthy(port)
    check_endpoint(port, directory)
    # A new version, of two replicas, takes over while clients go on asking: not one is refused or cut off.
    load = Load(port, byte_tokenizer().decode(expected(directory, 100)), 100)
    until("no answers", lambda: load.answers >= 4)
    deploy(directory, port, context=128, replicas=2)
    until("the new version didn't come up", lambda: running_replicas() == 2)
    after = load.answers
    until("no answers of the new version", lambda: load.answers >= after + 8)
    load.stop()
    assert context(port) == 128
    # Stages die: requests are told so.  One replica is killed, too.  Serve starts both anew, on the same devices.
    stages = list_actors(filters=[("class_name", "=", "StageActor"), ("state", "=", "ALIVE")])
    assert len(stages) == 4
    for stage in stages:
        os.kill(stage.pid, signal.SIGKILL)
    with pytest.raises(openai.InternalServerError, match="stage"):
        client(port).completions.create(model="tiny", prompt=PROMPT, max_tokens=50)
    replicas = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
    os.kill(next(a.pid for a in replicas if a.class_name.startswith("ServeReplica:llm")), signal.SIGKILL)
    time.sleep(3)  # the health check's period
    until("the replicas didn't come back", lambda: running_replicas() == 2, max_seconds=120)
    check_endpoint(port, directory)
    serve.shutdown()
    check_all_is_free()


def test_behind_haproxy(tmp_path: Path) -> None:
    """On a cluster of its own: the same answers, straight from the replica, and none is lost when a version follows."""
    with LocalCluster([LocalNode(name="one", devices=4, memory_bytes=1e9, spare_cpus=2)], haproxy=True) as cluster:
        (port,) = free_ports(1)
        directory = save_served(tmp_path, ("one/cpu0", "one/cpu1"), ("one/cpu2", "one/cpu3"))
        deploy(directory, port)
        wait_until_healthy(port)
        check_endpoint(port, directory)
        check_many_connections(port, directory)
        asked = {name: n for name, n in requests_by_server(cluster).items() if n}
        assert len(asked) == 1
        assert "SERVE_REPLICA" in next(iter(asked))
        load = Load(port, byte_tokenizer().decode(expected(directory, 100)), 100)
        until("no answers", lambda: load.answers >= 4)
        deploy(directory, port, context=128, replicas=2)
        until("the new version didn't come up", lambda: context(port) == 128)
        until("its other replica didn't come up", lambda: len(requests_by_server(cluster)) == 3)
        after = load.answers
        until("no answers of the new version", lambda: load.answers >= after + 8)
        load.stop()


def requests_by_server(cluster: LocalCluster) -> dict[str, int]:
    """How many requests HAProxy has passed on to each replica, and to Serve's own proxy, since it last began anew."""
    page = f"http://127.0.0.1:{cluster.environment['RAY_SERVE_HAPROXY_STATS_PORT']}/stats;csv"
    with urllib.request.urlopen(page, timeout=10) as answer:
        rows = list(csv.DictReader(answer.read().decode().removeprefix("# ").splitlines()))
    return {r["svname"]: int(r["stot"]) for r in rows if r["svname"].startswith("SERVE_")}
