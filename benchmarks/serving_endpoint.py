"""serve_llm.py's part about the endpoint: its start, its idleness, and what HTTP and Serve add to the engine."""

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
from benchmarks.arms import free_port
from benchmarks.serving_peers import Answers, Load, Work
from nesa_ray.cluster.local import LocalCluster, LocalNode

REPOSITORY = Path(__file__).resolve().parents[1]
IDLE_S = 20.0
MAX_START_S = 180.0


def endpoint_part(
    directory: Path, requests: tuple[Load, ...], rounds: int, ours: Callable[[nr.Engine, Work], Answers]
) -> tuple[dict[str, float], dict[str, float]]:
    """The figures, and what they may be at most: seconds of a start and the cores of an idle endpoint beyond those of
    an empty application, and what HTTP and Serve add to the first token and take from the throughput.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # one for both clusters
    cores = sorted(os.sched_getaffinity(0))[:2]
    nodes = [LocalNode(name="host", devices=2, cores=((cores[0],), (cores[-1],)), memory_bytes=4e9, spare_cpus=2)]
    model = {"model": str(directory), "stages": 2, "context": 512, "prefix_cache": False}
    work = Work(requests, 16)
    with LocalCluster(nodes, dashboard=False) as inner, tempfile.TemporaryDirectory() as temporary:
        inner.connect()
        with nr.Engine(nr.ServeConfig(**model)) as engine, LocalCluster(nodes, dashboard=False) as cluster:
            hello_s, idle_hello = [], []
            with application(Path(temporary), "benchmarks.hello_app:app", {}, "") as (port, seconds, _):
                hello_s.append(seconds)
                idle_hello.append(cores_used(cluster))
            with application(Path(temporary), "serve_apps.llm:build", model, directory.name) as (port, seconds, phases):
                print(json.dumps({"arm": "start", "hello_s": hello_s[0], "first_token_s": seconds, "phases": phases}))
                idle = cores_used(cluster)
                print(json.dumps({"arm": "idle", "hello_cores": idle_hello[0], "endpoint_cores": idle}), flush=True)
                ours(engine, Work(requests[:4], 4))
                over_http(port, directory.name, Work(requests[:4], 4))
                first: list[float] = []
                speed: list[float] = []
                for r in range(2 * rounds):
                    pair = {}
                    for arm in ("engine", "http")[:: 1 if r % 2 else -1]:
                        answers = ours(engine, work) if arm == "engine" else over_http(port, directory.name, work)
                        pair[arm] = (statistics.median(answers.first_token_s), work.output_tokens / answers.wall_s)
                        said = {"first_token_p50_s": pair[arm][0], "output_tokens_per_s": pair[arm][1]}
                        print(json.dumps({"arm": arm, "round": r, **said}), flush=True)
                    first.append(pair["http"][0] - pair["engine"][0])
                    speed.append(1 - pair["http"][1] / pair["engine"][1])
                alone = [
                    one_token(port, directory.name, requests[0]) - one_token_of(engine, requests[0], ours)
                    for _ in range(20)
                ]
    measured = {
        "start beyond hello, s": seconds - hello_s[0],
        "idle beyond hello, cores": idle - idle_hello[0],
        "HTTP and Serve: first token, s": statistics.median(alone),
        "HTTP and Serve: first token with 16 under way, s": statistics.median(first),
        "HTTP and Serve: throughput lost": statistics.median(speed),
    }
    limits = {
        "start beyond hello, s": 10.0,
        "idle beyond hello, cores": 0.02,
        "HTTP and Serve: first token, s": 0.005,
        "HTTP and Serve: throughput lost": 0.05,
    }
    return measured, limits


@contextlib.contextmanager
def application(
    directory: Path, import_path: str, args: dict[str, Any], model: str
) -> Iterator[tuple[int, float, list[str]]]:
    """`serve run` of it: its port, the seconds to its first answer (of a model: the first token), and its phases."""
    port = free_port()
    deployed = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "app", "route_prefix": "/", "import_path": import_path, "args": args}],
    }
    (directory / "app.yaml").write_text(yaml.safe_dump(deployed))
    command = [
        sys.executable,
        "-m",
        "ray.serve.scripts",
        "run",
        "--app-dir",
        str(REPOSITORY),
        str(directory / "app.yaml"),
    ]
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


def cores_used(cluster: LocalCluster) -> float:
    """CPU seconds per second of all of the cluster's processes, with nothing to do."""
    time.sleep(5.0)  # what a start leaves behind
    assert cluster._process is not None
    owner = psutil.Process(cluster._process.pid)

    def used() -> dict[int, float]:
        out = {}
        for p in [owner, *owner.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = p.cpu_times()
                out[p.pid] = times.user + times.system
        return out

    before, began = used(), time.perf_counter()
    time.sleep(IDLE_S)
    after, seconds = used(), time.perf_counter() - began
    return sum(s - before.get(pid, 0.0) for pid, s in after.items()) / seconds


def one_token(port: int, model: str, load: Load) -> float:
    """Seconds to a first token over HTTP."""
    body = json.dumps({"model": model, "prompt": list(load.prompt), "max_tokens": 1, "temperature": 0}).encode()
    began = time.perf_counter()
    ask = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(ask, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - began


def one_token_of(engine: nr.Engine, load: Load, ours: Callable[[nr.Engine, Work], Answers]) -> float:
    """Seconds to a first token of the engine itself."""
    return ours(engine, Work((Load(load.prompt, 1),), 1)).first_token_s[0]


def over_http(port: int, model: str, work: Work) -> Answers:
    """Streams, as a client would read them."""
    return asyncio.run(_over_http(port, model, work))


async def _over_http(port: int, model: str, work: Work) -> Answers:
    answers, slots, began = Answers(), asyncio.Semaphore(work.concurrency), time.perf_counter()
    url = f"http://127.0.0.1:{port}/v1/completions"

    async def one(session: aiohttp.ClientSession, load: Load) -> None:
        body = {"model": model, "prompt": list(load.prompt), "max_tokens": load.output_tokens, "temperature": 0}
        async with slots:
            asked, chunks = time.perf_counter(), 0
            async with session.post(url, json={**body, "stream": True}) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        if not chunks:
                            answers.first_token_s.append(time.perf_counter() - asked)
                        chunks += 1

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(session, load) for load in work.requests))
    answers.wall_s = time.perf_counter() - began
    return answers
