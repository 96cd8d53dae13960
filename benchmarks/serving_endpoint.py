"""serve_llm.py's part about the endpoint: its start, its idleness, and what HTTP and Serve add to the engine.

Behind HAProxy, the hello-world application that it is held against as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

import nesa_ray as nr
from benchmarks.serving_peers import Answers, Load, Work
from nesa_ray.cluster.local import LocalCluster, LocalNode, free_ports

REPOSITORY = Path(__file__).resolve().parents[1]
IDLE_S = 40.0
RAYS_OWN = (
    "ray::ServeController", "ray::ProxyActor", "ray::HAProxyManager", "ray::DashboardAgent", "ray::RuntimeEnvAgent",
    "ray::IDLE",
)  # fmt: skip
MAX_START_S = 180.0
SERVED = {"stages": 2, "context": 512, "prefix_cache": False}


def two_cores() -> LocalNode:
    """A node of two devices, a core each."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    return LocalNode(name="host", devices=2, cores=((cores[0],), (cores[-1],)), memory_bytes=4e9, spare_cpus=2)


def endpoint_part(
    directory: Path, requests: tuple[Load, ...], rounds: int, ours: Callable[[nr.Engine, Work], Answers]
) -> tuple[dict[str, float], dict[str, float]]:
    """The figures, and what they may be at most: seconds of a start and the cores of an idle endpoint's processes
    beyond those of an empty application, and what HTTP and Serve add to the first token and take from the throughput.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # one for all clusters
    nodes = [two_cores()]
    model = {"model": str(directory), **SERVED}
    work = Work(requests, 16)
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        with LocalCluster(nodes, dashboard=False, haproxy=True) as cluster:
            with application(room, "benchmarks.hello_app:app", {}, "") as (port, hello_s, _):
                hello_idle, with_hello = cores_used(cluster)
                hello_answer_s = statistics.median(seconds_of(port, "", {"prompt": [1] * 70}) for _ in range(40))
            with application(room, "serve_apps.llm:build", model, directory.name) as (port, seconds, phases):
                idle, with_endpoint = cores_used(cluster)
        print(json.dumps({"arm": "start", "hello_s": hello_s, "first_token_s": seconds, "phases": phases}))
        whole = {"cluster_with_hello_cores": with_hello, "cluster_with_endpoint_cores": with_endpoint}
        print(json.dumps({"arm": "idle", "hello_cores": hello_idle, "endpoint_cores": idle, **whole}), flush=True)
        with contextlib.ExitStack() as running:
            running.enter_context(LocalCluster(nodes, dashboard=False)).connect()
            engine = running.enter_context(nr.Engine(nr.ServeConfig(**model)))
            running.enter_context(LocalCluster(nodes, dashboard=False, haproxy=True))
            engine.blueprint.plan.to_json(room / "plan.json")
            model |= {"plan": str(room / "plan.json")}
            with application(room, "serve_apps.llm:build", model, directory.name) as (port, _, _):
                arms: dict[str, Callable[[Work], Answers]] = {
                    "engine": lambda work: ours(engine, work),
                    "HTTP, streamed": lambda work: over_http(port, directory.name, work, stream=True),
                    "HTTP": lambda work: over_http(port, directory.name, work, stream=False),
                }
                single = Work((Load(requests[0].prompt, 1),) * 20, 1, tuple(0.25 * i for i in range(20)))
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
                for r in range(1 + 2 * rounds):
                    for name in list(arms)[:: 1 if r % 2 else -1]:
                        first_s = statistics.median(arms[name](single).first_token_s)
                        answers = arms[name](work)
                        speed = work.output_tokens / answers.wall_s
                        if r:  # the first warms up
                            found[name].append((first_s, speed))
                            said = {"first_token_p50_s": first_s, "output_tokens_per_s": speed}
                            print(json.dumps({"arm": name, "round": r, **said}), flush=True)

    def added_s(name: str) -> float:
        return statistics.median(a[0] - b[0] for a, b in zip(found[name], found["engine"], strict=True))

    def lost(name: str) -> float:
        return statistics.median(1 - a[1] / b[1] for a, b in zip(found[name], found["engine"], strict=True))

    measured = {
        "start beyond hello, s": seconds - hello_s,
        "idle beyond hello, cores": idle - hello_idle,
        "hello's answer to a POST, s": hello_answer_s,
        "HTTP and Serve: first token, s": added_s("HTTP, streamed"),
        "HTTP and Serve: throughput lost": lost("HTTP"),
        "HTTP and Serve: throughput lost, streamed": lost("HTTP, streamed"),
    }
    limits = {
        "start beyond hello, s": 10.0,
        "idle beyond hello, cores": 0.02,
        "HTTP and Serve: first token, s": 0.005,
        "HTTP and Serve: throughput lost": 0.05,
        "HTTP and Serve: throughput lost, streamed": 0.05,
    }
    return measured, limits


@contextlib.contextmanager
def application(
    directory: Path, import_path: str, args: dict[str, Any], model: str
) -> Iterator[tuple[int, float, list[str]]]:
    """`serve run` of it: its port, the seconds to its first answer (of a model: the first token), and its phases."""
    (port,) = free_ports(1)
    deployed = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "app", "route_prefix": "/", "import_path": import_path, "args": args}],
    }
    (directory / "app.yaml").write_text(yaml.safe_dump(deployed))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", f"--app-dir={REPOSITORY}", str(directory / "app.yaml")]
    began, lines = time.perf_counter(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        while True:
            try:
                if model:
                    one_token(port, model, Load((1, 2, 3), 1))
                else:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60).read()
                break
            except OSError:
                if process.poll() is not None or time.perf_counter() - began > MAX_START_S:
                    raise RuntimeError("".join(lines)) from None
                time.sleep(0.05)
        seconds = time.perf_counter() - began
        time.sleep(1.0)  # its lines come a little later
        yield port, seconds, [m[1] for line in lines if (m := re.search(r"\w+: (.* in [\d.]+ s)\s*$", line))]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def cores_used(cluster: LocalCluster) -> tuple[float, float]:
    """CPU seconds per second with nothing to do: of the application's processes, and of all of the cluster's."""
    time.sleep(5.0)  # what a start leaves behind
    assert cluster._process is not None
    owner = psutil.Process(cluster._process.pid)

    def used() -> dict[int, tuple[float, str]]:
        out = {}
        for p in [owner, *owner.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = p.cpu_times()
                out[p.pid] = times.user + times.system, " ".join(p.cmdline())
        return out

    before, began = used(), time.perf_counter()
    time.sleep(IDLE_S)
    after, seconds = used(), time.perf_counter() - began
    mine = total = 0.0
    for pid, (used_s, command) in after.items():
        share = (used_s - before.get(pid, (0.0, ""))[0]) / seconds
        total += share
        if command.startswith("ray::") and not command.startswith(RAYS_OWN):
            mine += share
    return mine, total


def one_token(port: int, model: str, load: Load) -> float:
    """Seconds to a first token over HTTP."""
    return seconds_of(port, "v1/completions", {"model": model, "prompt": list(load.prompt), "max_tokens": 1})


def seconds_of(port: int, path: str, body: dict[str, Any]) -> float:
    """Seconds of a POST.  Raises OSError."""
    began, headers = time.perf_counter(), {"Content-Type": "application/json"}
    ask = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(ask, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - began


def over_http(port: int, model: str, work: Work, *, stream: bool) -> Answers:
    """As a client asks, whole or streamed; a first token is what comes first."""
    return asyncio.run(_over_http(port, model, work, stream))


async def _over_http(port: int, model: str, work: Work, stream: bool) -> Answers:
    answers, slots, began = Answers(), asyncio.Semaphore(work.concurrency), time.perf_counter()
    url = f"http://127.0.0.1:{port}/v1/completions"

    async def one(session: aiohttp.ClientSession, request: int, load: Load) -> None:
        body = {"model": model, "prompt": list(load.prompt), "max_tokens": load.output_tokens, "temperature": 0}
        body |= {"stream": stream, "return_token_ids": True}  # without a tokenizer there is no text to be streamed
        await asyncio.sleep(max(0.0, work.arrival(request) - (time.perf_counter() - began)))
        async with slots:
            asked, first = time.perf_counter(), True
            async with session.post(url, json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if first and line.startswith((b"data: {", b"{")):
                        answers.first_token_s.append(time.perf_counter() - asked)
                        first = False

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(session, i, load) for i, load in enumerate(work.requests)))
    answers.wall_s = time.perf_counter() - began
    return answers
