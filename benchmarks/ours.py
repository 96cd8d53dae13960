"""Our arm of the training benchmark: the trainer on a local Ray cluster, as a user would run it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.decoder import MICRO_BATCH, MICRO_BATCHES, TOKENS, VOCABULARY, token_stream
from nesa_ray.cluster.local import LocalCluster, LocalNode
from nesa_ray.cluster.probe import probe
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.stage import StageReport
from nesa_ray.training.trainer import Trainer
from nesa_ray.training.watching import pipeline_efficiency


def write_tokens(path: Path) -> None:
    """The benchmark's tokens as a training file of one document."""
    pq.write_table(pa.table({"input_ids": pa.array([token_stream().tolist()], pa.list_(pa.int32()))}), path)


@contextlib.contextmanager
def local_cluster(cores: Sequence[Sequence[int]], arms: int = 1) -> Iterator[None]:
    """A Ray cluster of one node with a device for each group of cores, for so many arms; this process drives it."""
    spare = (arms - 1) * sum(map(len, cores))
    groups = tuple(map(tuple, cores))
    node = LocalNode(name="host", devices=len(cores), cores=groups, memory_bytes=4e9, spare_cpus=spare)
    with LocalCluster([node], dashboard=False) as cluster:
        cluster.connect()
        yield


HALF_A_CORE = """
import contextlib, os, sys, time
os.sched_setaffinity(0, [int(sys.argv[1])])
with contextlib.suppress(PermissionError):  # in time-sharing, whoever sleeps now and then gets more than half
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
while True:
    until = time.perf_counter() + 0.005
    while time.perf_counter() < until:
        pass
    time.sleep(0.005)
"""


@contextlib.contextmanager
def busy(core: int) -> Iterator[None]:
    """Something that takes a core for 5 ms of every 10, whatever else wants it: half as fast for all others."""
    process = subprocess.Popen([sys.executable, "-c", HALF_A_CORE, str(core)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def even_cluster(file: Path) -> Path:
    """Writes the live cluster's cluster.json, every device as fast as the first: what an even split is planned for."""
    topology = probe()
    first = topology.devices[0]
    alike = {"flops_per_s": first.flops_per_s, "memory_bytes_per_s": first.memory_bytes_per_s}
    replace(topology, devices=tuple(replace(d, **alike) for d in topology.devices)).to_json(file)
    return file


class OursArm:
    """Two stages, placed, planned and scheduled by the framework itself on the cluster that this process drives.

    With `predict` each round ends with a prediction from operators timed anew: the machine isn't the same from minute
    to minute.
    """

    def __init__(self, *, predict: bool = False, **settings: Any) -> None:
        self._predict = predict
        self._directory = Path(tempfile.mkdtemp(prefix="nesa-bench-"))
        write_tokens(self._directory / "tokens.parquet")
        config = TrainConfig.from_dict(
            {
                "model": "benchmarks.decoder:example",
                "vocab_size": VOCABULARY,
                "data": {
                    "paths": [str(self._directory / "tokens.parquet")],
                    "sequence_length": TOKENS,
                    "shuffle": False,
                },
                "output": str(self._directory / "out"),
                "stages": 2,
                "measure": True,
                "micro_batch_size": MICRO_BATCH,
                "microbatches": MICRO_BATCHES,
                "optimizer": {"lr": 1e-3, "beta2": 0.999, "weight_decay": 0.0},
                "warmup_steps": 0,
                **settings,
            }
        )
        self.trainer = Trainer(config, show_progress=False)
        self._step = 0

    def run(self, steps: int) -> dict[str, Any]:
        """See Arm.

        efficiency       the schedule's length, simulated with each stage's measured pure compute, over the step's
        framework_share  of a step, what is neither compute, nor waiting for another stage, nor the optimizer
        predicted_s      a step as simulated
        quickest_s       the quickest step, without the optimizer, as predicted_s is
        driver_share     of one core, what this process used meanwhile
        """
        began, used = time.perf_counter(), time.process_time()
        several = self.trainer.pipeline.call("steps", self._step, [1e-3] * steps)
        self._step += steps
        reports = [{seat: of[i] for seat, of in several.items()} for i in range(steps)]
        seconds, used = time.perf_counter() - began, time.process_time() - used
        links, mean_s = self.trainer.stage_links, seconds / steps
        efficiencies = [
            pipeline_efficiency(self.trainer.schedule, links, r, mean_s, steps=steps, barrier=False) for r in reports
        ]
        shares = [max(_framework_share(r) for r in report.values()) for report in reports]
        last = reports[-1]
        predicted_s = self.trainer.predict_step_s() if self._predict else self.trainer.predicted_step_s
        return {
            "seconds": seconds,
            "loss": next(r.loss for r in last.values() if r.loss is not None),
            "schedule": self.trainer.schedule.name,
            "efficiency": sum(efficiencies) / steps,
            "framework_share": sum(shares) / len(shares),
            "predicted_s": predicted_s,
            "quickest_s": min(max(r.step_s - r.optimizer_s for r in report.values()) for report in reports),
            "driver_share": used / seconds,
            "stages": {
                str(stage): {
                    "compute_s": r.compute_s, "wait_s": r.wait_s, "optimizer_s": r.optimizer_s, "step_s": r.step_s,
                    **{k.value: v for of in r.action_s.values() for k, v in of.items()},
                }
                for (stage, _), r in last.items()
            },
        }  # fmt: skip

    def close(self) -> None:
        """See Arm."""
        self.trainer.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _framework_share(report: StageReport) -> float:
    inside = report.compute_s * MICRO_BATCHES + report.wait_s + report.optimizer_s
    return 1 - inside / report.step_s
