"""Who has no cluster: commands start one of this machine, and a node without labels is divided as is asked for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nesa_ray.cluster.local import LocalCluster, LocalNode, free_ports
from tests.integration.test_cluster import session_of
from tests.integration.test_serve import check_endpoint, save_served, wait_until_healthy

COMMAND = [sys.executable, "-m", "nesa_ray.cli"]
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core is one device at most")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and no plan for it."""
    return save_served(tmp_path_factory.mktemp("own"))


def environment() -> dict[str, str]:
    """That of somebody who has told Ray nothing."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def supervisor_of(process: "subprocess.Popen[str]") -> tuple[int, Path]:
    """The process that owns the cluster which that process started, and the cluster's directory."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    for child in {c for file in children for c in file.read_text().split()}:
        argv = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        if any(a.endswith("supervisor.py") for a in argv):
            return int(child), Path(argv[-2])
    raise AssertionError("it has started no cluster")


@needs_two_cores
@pytest.mark.slow
def test_serving_starts_a_cluster_and_leaves_nothing(directory: Path) -> None:
    (port,) = free_ports(1)
    (directory / "own.yaml").write_text(yaml.safe_dump({"model": "model", "name": "tiny", "stages": 2, "port": port}))
    process = subprocess.Popen(
        [*COMMAND, "serve", str(directory / "own.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    try:
        wait_until_healthy(port, process)
        supervisor, ray_directory = supervisor_of(process)
        check_endpoint(port, directory)
    finally:
        process.send_signal(signal.SIGTERM)  # as whoever runs services ends them; test_serve has SIGINT
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "no live Ray cluster: starting one of this machine" in said
    for _ in range(150):
        if not ray_directory.exists():
            break
        time.sleep(0.1)
    assert not ray_directory.exists()
    assert not [p for p in Path("/proc").glob("[0-9]*/stat") if session_of(p) == str(supervisor)]


@needs_two_cores
@pytest.mark.slow
def test_training_starts_a_cluster(directory: Path) -> None:
    rows = [[3 + i % 300 for i in range(n, n + 50)] for n in range(20)]
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), directory / "train.parquet")
    settings = {
        "model": "model", "data": {"paths": ["train.parquet"], "sequence_length": 16}, "output": "out", "stages": 2,
        "micro_batch_size": 2, "microbatches": 2, "steps": 2,
    }  # fmt: skip
    (directory / "train.yaml").write_text(yaml.safe_dump(settings))
    trained = subprocess.run(
        [*COMMAND, "train", str(directory / "train.yaml")],
        capture_output=True, text=True, env=environment(), timeout=180,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "cpu1of2" in trained.stdout
    assert (directory / "out" / "model" / "config.json").is_file()


PLANS = """
import sys, json, nesa_ray as nr
from nesa_ray.errors import InvalidTopology
model, plan = sys.argv[1:]
tokens = []
for of in ({"stages": 2}, {"plan": plan}):
    engine = nr.Engine(nr.ServeConfig(model=model, **of))
    tokens.append(engine.generate("def", temperature=0, max_tokens=5).token_ids)
    engine.blueprint.plan.to_json(plan)
    where = engine._stages.where()
    if "stages" in of:
        engine.close()  # the other one is closed when the process ends
text = open(plan).read().replace("cpu1of2", "cpu7of8")
open(plan, "w").write(text)
try:
    nr.Engine(nr.ServeConfig(model=model, plan=plan))
except InvalidTopology as e:
    refused = str(e)
print(json.dumps({"tokens": tokens, "devices": sorted(engine.blueprint.plan.devices), "refused": refused}))
"""


@needs_two_cores
@pytest.mark.slow
def test_a_node_without_labels_is_divided_and_by_a_plan_as_before(directory: Path, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    with LocalCluster([LocalNode(name="plain", devices=None, memory_bytes=2e9)], dashboard=False):
        run = subprocess.run(
            [sys.executable, "-c", PLANS, str(directory / "model"), str(tmp_path / "plan.json")],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = yaml.safe_load(run.stdout.splitlines()[-1])
    assert said["devices"] == ["plain/cpu0of2", "plain/cpu1of2"]
    assert said["tokens"][0] == said["tokens"][1]
    if cores < 8:
        assert said["refused"] == "the live cluster has no device 'plain/cpu7of8'; undivided, it has plain/cpu0"
