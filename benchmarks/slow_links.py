"""Training over links a thousand times slower than a bus: ours against torch.distributed.pipelining, 1F1B over gloo.

    python benchmarks/slow_links.py [--quick] [--rounds N] [--parts pipeline,loss,replicas,planned]     (Linux, root)

Two emulated hosts of one core each; the model and the batch of train_pipeline.py.  For each link every arm runs in
turn: ours, ours with everything off (no codec, 1F1B, micro-batches as they are given), torch.  Then the held-out loss
with and without codecs, two replicas with local steps against ZeRO in every step, and four hosts with one slow pair.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms import Arm, conclude, interleave, median_ratio
from benchmarks.decoder import MICRO_BATCH, MICRO_BATCHES, TOKENS
from benchmarks.emulated_hosts import EmulatedHosts
from nesa_ray.cluster.local import LocalNode
from nesa_ray.cluster.topology import Link

STEP_TOKENS = MICRO_BATCH * MICRO_BATCHES * TOKENS
LINKS = {
    "unlimited": (Link(), None),
    "20 ms, 100 Mbit/s": (Link(12.5e6, 0.02), 1.25),
    "20 ms, 20 Mbit/s": (Link(2.5e6, 0.02), 2.2),
    "50 ms, 5 Mbit/s": (Link(625e3, 0.05), 5.5),
    "50 ms, 1 Mbit/s": (Link(125e3, 0.05), 12.0),
}
SMALLER = {"model": "benchmarks.decoder:smaller_example", "micro_batch_size": MICRO_BATCH // 2}
OURS = {"codec": "auto", **SMALLER, "microbatches": 2 * MICRO_BATCHES}
OFF = {"codec": "raw", "schedule": "1f1b"}


def torch_rank(pipe: Connection, rank: int, host: str, port: int) -> None:
    """One rank of torch's pipeline: runs as many steps as it is sent."""
    import torch

    from benchmarks.train_pipeline import torch_pipelining

    torch.set_num_threads(1)
    serve(pipe, torch_pipelining(rank, port, host))


def our_driver(pipe: Connection, settings: Mapping[str, Any]) -> None:
    """The driver of our arm: runs as many steps as it is sent."""
    import ray

    from benchmarks.ours import OursArm

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    arm = OursArm(**settings)
    try:
        serve(pipe, arm.run)
    finally:
        arm.close()


def our_run(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Some steps from fresh weights, after one that warms up, and the held-out loss at their end."""
    import ray

    from benchmarks.ours import OursArm

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    arm = OursArm(**settings)
    try:
        arm.run(1)
        result = arm.run(steps)
        return result | {"held_out_loss": arm.held_out_loss()}
    finally:
        arm.close()


def serve(pipe: Connection, run: Callable[[int], Any]) -> None:
    """Says that it is ready, then answers every number of steps with what they gave."""
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(run(pipe.recv()))


class HostArm:
    """An arm whose processes are on emulated hosts; the first one's answer counts."""

    def __init__(self, processes: Sequence[Any]) -> None:
        self._processes = processes
        for process in processes:
            process.pipe.recv()

    def run(self, steps: int) -> dict[str, Any]:
        """See Arm."""
        began = time.perf_counter()
        for process in self._processes:
            process.pipe.send(steps)
        answers = [process.pipe.recv() for process in self._processes]
        seconds = time.perf_counter() - began
        ours = next((a for a in answers if isinstance(a, dict)), {})
        return {**ours, "seconds": ours.get("seconds", seconds)}

    def close(self) -> None:
        """See Arm."""
        for process in self._processes:
            process.close(30.0)


def ours(hosts: EmulatedHosts, **settings: Any) -> Arm:
    """Our arm, driven from the first host."""
    return HostArm([hosts.start(next(iter(hosts.nodes)), our_driver, settings)])


def torch_arm(hosts: EmulatedHosts, port: int) -> Arm:
    """torch's pipeline, a rank on each of the first two hosts."""
    a, b = list(hosts.nodes)[:2]
    return HostArm([hosts.start(host, torch_rank, rank, hosts.ip[a], port) for rank, host in enumerate((a, b))])


@contextlib.contextmanager
def running(make: Mapping[str, Callable[[], Arm]]) -> Iterator[dict[str, Arm]]:
    """The arms, all alive."""
    arms: dict[str, Arm] = {}
    try:
        for name, one in make.items():
            arms[name] = one()
        yield arms
    finally:
        for arm in arms.values():
            arm.close()


@contextlib.contextmanager
def hosts_with_ray(count: int, spare: int = 0, **options: Any) -> Iterator[EmulatedHosts]:
    """Hosts of one device each, dealt out of this machine's cores, with Ray on them."""
    nodes = [LocalNode(name=f"h{i}", devices=1, memory_bytes=4e9, spare_cpus=spare) for i in range(count)]
    with EmulatedHosts(nodes, **options) as hosts:
        hosts.start_ray()
        yield hosts


def pipeline(rounds: int, ratios: dict[str, float], goals: dict[str, float], names: Sequence[str]) -> None:
    """Two stages over one link after the other."""
    fastest: float | None = None
    with hosts_with_ray(2, spare=2) as hosts:
        a, b = hosts.nodes
        for i, name in enumerate(names):
            link, goal = LINKS[name]
            hosts.set_link(a, b, link)
            make: dict[str, Callable[[], Arm]] = {
                "ours": lambda: ours(hosts, **OURS),
                "ours, everything off": lambda: ours(hosts, **OFF),
                "torch": lambda i=i: torch_arm(hosts, 29500 + i),  # type: ignore[misc]
            }
            with running(make) as arms:
                results = interleave(arms, rounds if i < 4 else min(rounds, 2), 2 if i < 3 else 1)
            steps = 2 if i < 3 else 1
            rates = {n: [steps * STEP_TOKENS / r["seconds"] for r in rows] for n, rows in results.items()}
            for arm, rows in results.items():
                extra = {k: v for k, v in rows[-1].items() if k in ("schedule", "efficiency", "loss", "predicted_s")}
                row = {"link": name, "arm": arm, "tokens_per_s": round(statistics.median(rates[arm]), 1)}
                print(json.dumps(row | {"all": [round(r, 1) for r in rates[arm]]} | extra), flush=True)
            ratios[f"{name}: ours / torch"] = median_ratio(rates["ours"], rates["torch"])
            ratios[f"{name}: ours / everything off"] = median_ratio(rates["ours"], rates["ours, everything off"])
            if goal is not None:
                goals[f"{name}: ours / torch"] = goal
            if name == "unlimited":
                fastest = statistics.median(rates["ours"])
            elif fastest is not None:
                ratios[f"{name}: ours / ours unlimited"] = statistics.median(rates["ours"]) / fastest
    goals["50 ms, 5 Mbit/s: ours / ours unlimited"] = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, at two links only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="pipeline")
    parser.add_argument("--links", default=",".join(map(str, range(len(LINKS)))), help="numbers of links, from 0")
    options = parser.parse_args()
    names = [list(LINKS)[int(i)] for i in options.links.split(",")]
    if options.quick:
        names = [list(LINKS)[i] for i in (0, 2)]
    ratios: dict[str, float] = {}
    goals: dict[str, float] = {}
    if "pipeline" in options.parts:
        pipeline(1 if options.quick else options.rounds, ratios, goals, names)
    conclude("slow_links", ratios, goals)


if __name__ == "__main__":
    main()
