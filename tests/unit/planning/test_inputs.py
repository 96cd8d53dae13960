"""Bad graph.json and cluster.json: one clear line, exit status 2, within the time."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from nesa_ray.cli import main

GRAPH: dict[str, Any] = {
    "version": 1,
    "name": "g",
    "nodes": [
        {"id": i, "name": f"n{i}", "compute_s": {"gpu": 0.5}, "output_bytes": 10, "memory_bytes": 3, "flops": 1}
        for i in range(5)
    ],
    "edges": [[0, 1], [1, 2], [2, 3], [3, 4]],
}
CLUSTER: dict[str, Any] = {
    "version": 1,
    "devices": [{"id": f"d{i}", "kind": "gpu", "node": "h", "memory_bytes": 10, "flops_per_s": 1.0} for i in range(3)],
    "links": {"default": {"bytes_per_s": 100, "latency_s": 0.1}, "pairs": []},
}


def plan(folder: Path, graph: Any, cluster: Any, capsys: pytest.CaptureFixture, *options: str) -> tuple[int, str]:
    """(exit status, standard error) of `nesa-ray plan`."""
    for name, value in (("graph", graph), ("cluster", cluster)):
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}.json").write_text(text)
    arguments = ["plan", "--graph", str(folder / "graph.json"), "--cluster", str(folder / "cluster.json"), *options]
    started = time.monotonic()
    try:
        main(arguments)
        status = 0
    except SystemExit as e:
        status = int(e.code or 0)
    assert time.monotonic() - started < 20
    return status, capsys.readouterr().err


def changed(value: Any, path: str, to: Any) -> Any:
    """A copy with one place changed; `path` is like nodes.2.compute_s."""
    copy = json.loads(json.dumps(value))
    *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    at = copy
    for p in way:
        at = at[p]
    if to is ...:
        del at[last]
    else:
        at[last] = to
    return copy


BAD_GRAPHS = [
    ("edges", [[0, 1], [1, 0]], "cycle"), ("edges", [[0, 9]], "9"), ("edges", [[0]], "edges[0]"),
    ("edges", 3, "edges"), ("nodes", [], "nodes"), ("nodes", ..., "nodes"), ("nodes.1.id", 0, "node 0"),
    ("nodes.1.name", "n0", "n0"), ("nodes.1.id", ..., "id"), ("nodes.1.compute_s.gpu", -1, "compute_s.gpu"),
    ("nodes.1.compute_s.gpu", float("nan"), "compute_s.gpu"), ("nodes.1.compute_s", [1], "compute_s"),
    ("nodes.1.compute_s", {"tpu": 1}, "node 1"), ("nodes.1.memory_bytes", float("inf"), "memory_bytes"),
    ("nodes.1.memory_bytes", 11, "memory"), ("nodes.1.output_bytes", "much", "output_bytes"),
    ("nodes.1.flop", 1, "flops"), ("nodes.1", 7, "nodes[1]"), ("version", 2, "version"),
    ("nodes.1.backward", "yes", "backward"), ("nodes.1.output_bytes", 10**400, "output_bytes"),
]  # fmt: skip
BAD_CLUSTERS = [
    ("devices", [], "devices"), ("devices.0.memory_bytes", ..., "memory_bytes"), ("devices.1.id", "d0", "d0"),
    ("devices.0.memory_bytes", -1, "memory_bytes"), ("devices.0.kind", 4, "kind"),
    ("links.default.bytes_per_s", 0, "bytes_per_s"), ("links.default.latency_s", -1, "latency_s"),
    ("links.pairs", [{"a": "h", "b": "nowhere", "bytes_per_s": 1}], "nowhere"), ("devices.0.colour", 1, "colour"),
    ("links", [], "links"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "to", "names"), BAD_GRAPHS)
def test_bad_graphs(path: str, to: Any, names: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, said = plan(tmp_path, changed(GRAPH, path, to), CLUSTER, capsys)
    assert status == 2
    assert len(said.strip().splitlines()) == 1
    assert names in said


@pytest.mark.parametrize(("path", "to", "names"), BAD_CLUSTERS)
def test_bad_clusters(path: str, to: Any, names: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, said = plan(tmp_path, GRAPH, changed(CLUSTER, path, to), capsys)
    assert status == 2
    assert len(said.strip().splitlines()) == 1
    assert names in said


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"nodes": {}}', "[" * 100_000, "\x00"])
def test_what_is_not_a_graph(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, said = plan(tmp_path, text, CLUSTER, capsys)
    assert (status, len(said.strip().splitlines())) == (2, 1)


def test_random_damage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = random.Random(0)
    values = [None, True, -1, 0, 1e308, float("nan"), float("inf"), "", "x", [], {}, [[1]], 10**30]

    def damage(value: Any) -> Any:
        if isinstance(value, dict) and value:
            key = rng.choice(list(value))
            return {**value, key: rng.choice(values)} if rng.random() < 0.4 else {**value, key: damage(value[key])}
        if isinstance(value, list) and value:
            i = rng.randrange(len(value))
            return [*value[:i], rng.choice(values) if rng.random() < 0.4 else damage(value[i]), *value[i + 1 :]]
        return rng.choice(values)

    for _ in range(80):
        graph, cluster = (damage(GRAPH), CLUSTER) if rng.random() < 0.6 else (GRAPH, damage(CLUSTER))
        status, said = plan(tmp_path, graph, cluster, capsys, "--max-seconds", "5")
        assert status in (0, 2), (graph, cluster, said)
        assert len(said.strip().splitlines()) == (1 if status else 0), said


def test_a_good_pair_is_planned_and_scored_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    status, said = plan(tmp_path, GRAPH, CLUSTER, capsys, "--out", str(out), "--html", str(page), "--explain")
    assert (status, said) == (0, "")
    written = json.loads(out.read_text())
    assert {"bottleneck_s", "latency_s", "lower_bound_s", "gap", "planning_s", "stages"} <= set(written)
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("options", [["--stages", "9"], ["--objective", "x"], ["--replicas", "x"], ["--zero", "9"]])
def test_bad_options(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, said = plan(tmp_path, GRAPH, CLUSTER, capsys, *options)
    assert (status, len(said.strip().splitlines())) == (2, 1)
