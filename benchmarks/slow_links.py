"""Training over links a thousand times slower than a bus: ours against torch.distributed.pipelining, 1F1B over gloo.

    python benchmarks/slow_links.py [--quick] [--rounds N] [--parts pipeline,loss,…]     (Linux, root)

Two emulated hosts of one core each; the model and the batch of train_pipeline.py.  For each link every arm runs in
turn: ours, ours with everything off (no codec, 1F1B, micro-batches as they are given), torch.  Then the held-out loss
with and without codecs, two replicas with local steps against ZeRO in every step, four hosts with one slow pair, and
decoding over three hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import namespaces
from benchmarks.arms import Arm, conclude, interleave, median_ratio
from benchmarks.decoder import MICRO_BATCH, MICRO_BATCHES, TOKENS, VOCABULARY
from benchmarks.emulated_hosts import EmulatedHosts
from nesa_ray.cluster.local import LocalNode
from nesa_ray.cluster.topology import Device, Link, Topology

STEP_TOKENS = MICRO_BATCH * MICRO_BATCHES * TOKENS
LINKS = {
    "unlimited": (Link(), None),
    "20 ms, 100 Mbit/s": (Link(12.5e6, 0.02), 1.25),
    "20 ms, 20 Mbit/s": (Link(2.5e6, 0.02), 2.2),
    "50 ms, 5 Mbit/s": (Link(625e3, 0.05), 5.5),
    "50 ms, 1 Mbit/s": (Link(125e3, 0.05), 12.0),
}
SMALLER = {"model": "benchmarks.decoder:smaller_example", "micro_batch_size": MICRO_BATCH // 2}
OURS = {"codec": "auto", "measure": True, **SMALLER, "microbatches": 2 * MICRO_BATCHES}
DECODED = 24  # tokens of a stream
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


def our_training(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A whole run on text of its own kind (`chain`), and the held-out loss at its end."""
    import ray

    from nesa_ray.training.config import TrainConfig
    from nesa_ray.training.trainer import Trainer

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory(prefix="nesa-bench-") as directory:
        for name, seed, count in (("train", 1, 1 << 19), ("held_out", 2, 1 << 14)):
            table = pa.table({"input_ids": pa.array([chain(seed, count)], pa.list_(pa.int32()))})
            pq.write_table(table, f"{directory}/{name}.parquet")
        common = {
            "model": "benchmarks.decoder:example", "vocab_size": VOCABULARY, "micro_batch_size": MICRO_BATCH,
            "microbatches": MICRO_BATCHES, "zero": 0, "data": {"paths": [f"{directory}/train.parquet"],
            "sequence_length": TOKENS}, "held_out": [f"{directory}/held_out.parquet"], "eval_every": steps,
            "output": f"{directory}/out", "steps": steps, "optimizer": {"lr": 1e-3}, "warmup_steps": 10,
        }  # fmt: skip
        with Trainer(TrainConfig.from_dict(common | dict(settings)), show_progress=False) as trainer:
            result = trainer.fit()
    return {"held_out_loss": result.held_out_loss, "tokens_per_s": result.tokens_per_s}


def chain(seed: int, count: int) -> list[int]:
    """Tokens each of which four may follow: something to learn, entropy 1.39 nats a token."""
    follow = np.random.default_rng(0).integers(0, VOCABULARY, (VOCABULARY, 4))
    picks = np.random.default_rng(seed).integers(0, 4, count)
    tokens = [int(picks[0])]
    for pick in picks[1:]:
        tokens.append(int(follow[tokens[-1], pick]))
    return tokens


def serve(pipe: Connection, run: Callable[[int], Any]) -> None:
    """Says that it is ready, then answers every number of steps with what they gave."""
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(run(pipe.recv()))


class HostArm:
    """An arm whose processes are on emulated hosts; the first one's answer counts.

    A run has `times` as many steps as it is asked for, and its seconds are divided by it: what comes once a run, like
    the driver's call and TCP's start after a pause, is as long for one step as for many.
    """

    def __init__(self, processes: Sequence[Any], times: int = 1) -> None:
        self._processes, self._times = processes, times
        for process in processes:
            process.pipe.recv()

    def run(self, steps: int) -> dict[str, Any]:
        """See Arm."""
        began = time.perf_counter()
        for process in self._processes:
            process.pipe.send(self._times * steps)
        answers = [process.pipe.recv() for process in self._processes]
        seconds = time.perf_counter() - began
        ours = next((a for a in answers if isinstance(a, dict)), {})
        return {**ours, "seconds": ours.get("seconds", seconds) / self._times}

    def close(self) -> None:
        """See Arm."""
        for process in self._processes:
            process.close(30.0)


def ours(hosts: EmulatedHosts, *, times: int = 1, **settings: Any) -> Arm:
    """Our arm, driven from the first host."""
    return HostArm([hosts.start(next(iter(hosts.nodes)), our_driver, settings)], times)


def torch_arm(hosts: EmulatedHosts, port: int, times: int) -> Arm:
    """torch's pipeline, a rank on each of the first two hosts."""
    a, b = list(hosts.nodes)[:2]
    ranks = [hosts.start(host, torch_rank, rank, hosts.ip[a], port) for rank, host in enumerate((a, b))]
    return HostArm(ranks, times)


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


class OverLink:
    """An arm that is made and runs over one link, whatever the others' in between."""

    def __init__(self, hosts: EmulatedHosts, link: Link, make: Callable[[], Arm]) -> None:
        self._hosts, self._link = hosts, link
        self._set()
        self._arm = make()

    def run(self, steps: int) -> dict[str, Any]:
        """See Arm."""
        self._set()
        return self._arm.run(steps)

    def close(self) -> None:
        """See Arm."""
        self._arm.close()

    def _set(self) -> None:
        self._hosts.set_link(*list(self._hosts.nodes)[:2], self._link)


def pipeline(rounds: int, ratios: dict[str, float], goals: dict[str, float], names: Sequence[str]) -> None:
    """Two stages over one link after the other; over the slow ones beside ours over an unlimited one."""
    with hosts_with_ray(2, spare=3) as hosts:
        for name in names:
            link, goal = LINKS[name]
            i = list(LINKS).index(name)
            few = 3 if i < 3 else 1  # a step takes torch, and ours with everything off, up to a minute and a half
            mine = partial(ours, hosts, times=6, **OURS)
            make: dict[str, Callable[[], Arm]] = {
                "ours": partial(OverLink, hosts, link, mine),
                "ours, everything off": partial(OverLink, hosts, link, partial(ours, hosts, times=few, **OFF)),
                "torch": partial(OverLink, hosts, link, partial(torch_arm, hosts, 29500 + i, few)),
            }
            if i:
                make["ours, unlimited"] = partial(OverLink, hosts, Link(), mine)
            steps = 1 if name == "50 ms, 1 Mbit/s" else 2
            with running(make) as arms:
                results = interleave(arms, rounds, steps)
            rates = {n: [steps * STEP_TOKENS / r["seconds"] for r in rows] for n, rows in results.items()}
            for arm, rows in results.items():
                extra = {k: v for k, v in rows[-1].items() if k in ("schedule", "efficiency", "loss", "predicted_s")}
                row = {"link": name, "arm": arm, "tokens_per_s": round(statistics.median(rates[arm]), 1)}
                print(json.dumps(row | {"all": [round(r, 1) for r in rates[arm]]} | extra), flush=True)
            ratios[f"{name}: ours / torch"] = median_ratio(rates["ours"], rates["torch"])
            ratios[f"{name}: ours / everything off"] = median_ratio(rates["ours"], rates["ours, everything off"])
            if goal is not None:
                goals[f"{name}: ours / torch"] = goal
                ratios[f"{name}: ours / ours unlimited"] = median_ratio(rates["ours"], rates["ours, unlimited"])
    goals["50 ms, 5 Mbit/s: ours / ours unlimited"] = 0.8


def losses(steps: int, ratios: dict[str, float], goals: dict[str, float]) -> None:
    """What codecs do to the loss: the same run raw, and over 5 Mbit/s in what `auto` picks."""
    with hosts_with_ray(2, spare=2) as hosts:
        a, b = hosts.nodes
        raw = hosts.call(a, our_training, {"stages": 2}, steps)
        hosts.set_link(a, b, LINKS["50 ms, 5 Mbit/s"][0])
        encoded = hosts.call(a, our_training, {"stages": 2, **OURS}, steps)
    for name, row in (("raw", raw), ("auto, 50 ms, 5 Mbit/s", encoded)):
        print(json.dumps({"codec": name, **row, "steps": steps}), flush=True)
    ratios["held-out loss, encoded / raw"] = encoded["held_out_loss"] / raw["held_out_loss"]
    goals["held-out loss, encoded / raw"] = 1.01


def sent_bytes(hosts: EmulatedHosts) -> float:
    """Bytes that the hosts have sent so far."""
    total = 0.0
    for host in hosts.nodes:
        rows = hosts.run(host, ["cat", "/proc/self/net/dev"]).stdout.splitlines()
        (row,) = (r.partition(":")[2] for r in rows if r.strip().startswith(f"{namespaces.DEVICE}:"))
        total += float(row.split()[8])
    return total


def replicas(steps: int, ratios: dict[str, float], goals: dict[str, float]) -> None:
    """Two replicas behind 50 ms and 20 Mbit/s: local steps against ZeRO-2 in every step."""
    both = {"stages": 1, "replicas": 2, "microbatches": MICRO_BATCHES // 2}
    local = {**both, "sync": "local", "zero": 0}
    slow = Link(2.5e6, 0.05)
    with hosts_with_ray(2, spare=2) as hosts:
        a, b = hosts.nodes
        found: dict[str, dict[str, float]] = {}
        runs = (
            ("local steps, unlimited", local, Link(), steps),
            ("local steps", local, slow, steps),
            ("ZeRO-2", {**both, "zero": 2}, slow, 2),
        )
        for name, settings, link, count in runs:
            hosts.set_link(a, b, link)
            with running({name: lambda settings=settings: ours(hosts, **settings)}) as arms:  # type: ignore[misc]
                arms[name].run(1)
                before = sent_bytes(hosts)
                seconds = arms[name].run(count)["seconds"]
                sent = sent_bytes(hosts) - before
            tokens = count * STEP_TOKENS
            found[name] = {"tokens_per_s": tokens / seconds, "bytes_per_token": sent / tokens}
            print(json.dumps({"replicas": name, **found[name]}), flush=True)
        hosts.set_link(a, b, Link())
        learnt = {
            name: hosts.call(a, our_training, settings, 2 * steps)["held_out_loss"]
            for name, settings in (("local steps", local), ("ZeRO-2", {**both, "zero": 2}))
        }
    print(json.dumps({"held-out losses": learnt, "steps": 2 * steps}), flush=True)
    each, zero = found["local steps"], found["ZeRO-2"]
    ratios["bytes a token, ZeRO-2 / local steps"] = zero["bytes_per_token"] / each["bytes_per_token"]
    ratios["local steps / unlimited"] = each["tokens_per_s"] / found["local steps, unlimited"]["tokens_per_s"]
    ratios["local steps / ZeRO-2"] = each["tokens_per_s"] / zero["tokens_per_s"]
    ratios["held-out loss, local steps / ZeRO-2"] = learnt["local steps"] / learnt["ZeRO-2"]
    goals |= {
        "bytes a token, ZeRO-2 / local steps": 100.0, "local steps / unlimited": 0.9,
        "held-out loss, local steps / ZeRO-2": 1.02,
    }  # fmt: skip


def devices(hosts: EmulatedHosts) -> tuple[Device, ...]:
    """The hosts' devices, all alike."""
    return tuple(
        Device(id=f"{h}/cpu0", kind="cpu", node=h, memory_bytes=4e9, flops_per_s=1e11, cores=n.resolved_cores()[0])
        for h, n in hosts.nodes.items()
    )


def planned(rounds: int, ratios: dict[str, float], goals: dict[str, float]) -> None:
    """Four hosts, one pair of whose links is ten times slower: a plan that knows it, and one that doesn't."""
    common, slow = Link(12.5e6, 0.005), Link(1.25e6, 0.005)
    with hosts_with_ray(4, spare=2, link=common, pairs={("h1", "h2"): slow}) as hosts:
        knowing = Topology(devices(hosts), default=common, pairs={frozenset(("h1", "h2")): slow})
        with tempfile.TemporaryDirectory() as directory:
            files = {"knows the links": knowing, "doesn't": replace(knowing, pairs={})}
            make: dict[str, Callable[[], Arm]] = {}
            for i, (name, topology) in enumerate(files.items()):
                file = f"{directory}/{i}.json"
                topology.to_json(file)
                make[name] = lambda file=file: ours(hosts, cluster=file, stages=4, measure=False)  # type: ignore[misc]
            with running(make) as arms:
                results = interleave(arms, rounds, 1)
    seconds = {n: [r["seconds"] for r in rows] for n, rows in results.items()}
    for name, all_s in seconds.items():
        print(json.dumps({"plan": name, "step_s": statistics.median(all_s)}), flush=True)
    ratios["step, plan that doesn't know / that knows"] = median_ratio(seconds["doesn't"], seconds["knows the links"])
    goals["step, plan that doesn't know / that knows"] = 1.5


def llama(directory: str) -> None:
    """Writes a Llama of 660 million random parameters.

    Sixteen streams can't have more than 16 tokens per 3 × 50 ms and a step's computing: what would be faster than that
    without a delay has to be slower with it, by any framework.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1536, intermediate_size=4096, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000, max_position_embeddings=512, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def our_engine(pipe: Connection, directory: str, cluster: str) -> None:
    """The engine of a served model: decodes as many streams as it is sent, `DECODED` tokens each."""
    import ray

    from nesa_ray.serving.config import ServeConfig
    from nesa_ray.serving.engine import Engine

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    config = ServeConfig(model=directory, cluster=cluster, stages=3, context=256, max_sequences=16, prefix_cache=False)
    with Engine(config) as engine:
        serve(pipe, lambda streams: decode(engine, streams))


def decode(engine: Any, streams: int) -> dict[str, Any]:
    """Tokens per second of so many streams at once, from when all have their first, and the greedy tokens."""
    from nesa_ray.serving.request import Sampling

    pieces: queue.SimpleQueue[tuple[int, Any, float]] = queue.SimpleQueue()
    for i in range(streams):
        prompt = np.random.default_rng(i).integers(0, 32000, 16).tolist()
        wanted = Sampling(max_tokens=DECODED, temperature=0.0, ignore_eos=True)
        engine.submit(prompt, wanted, lambda p, i=i: pieces.put((i, p, time.perf_counter())))
    tokens: dict[int, list[int]] = {i: [] for i in range(streams)}
    began, counted, ended = 0.0, 0, 0.0
    while any(len(t) < DECODED for t in tokens.values()):
        i, piece, ended = pieces.get()
        if isinstance(piece, Exception):
            raise piece
        tokens[i] += piece.token_ids
        counted += bool(began)
        began = began or (ended if all(tokens.values()) else 0.0)
    said = {"seconds": ended - began, "tokens_per_s": counted / (ended - began), "tokens": tokens}
    return said | {"batches_in_flight": engine.scheduler.batches_in_flight}


def serving(rounds: int, ratios: dict[str, float], goals: dict[str, float]) -> None:
    """Three hosts with a stage each: decoding against the same without a delay, one stream and sixteen."""
    rates: dict[tuple[float, int], list[float]] = {}
    answers: dict[int, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nesa-bench-") as directory, hosts_with_ray(3, spare=2) as hosts:
        llama(directory)
        names = list(hosts.nodes)
        for _ in range(rounds):
            for delay_s in (0.0, 0.005, 0.05):
                link = Link(math.inf, delay_s)
                for a, b in itertools.combinations(names, 2):
                    hosts.set_link(a, b, link)
                file = f"{directory}/cluster.json"
                Topology(devices(hosts), default=Link(1e9, delay_s)).to_json(file)
                process = hosts.start(names[0], our_engine, directory, file)
                try:
                    process.pipe.recv()
                    for streams in (1, 16):
                        process.pipe.send(streams)
                        found = process.pipe.recv()
                        if answers.setdefault(streams, found["tokens"]) != found["tokens"]:
                            raise SystemExit(f"{streams} streams at {delay_s} s: other tokens than without a delay")
                        rates.setdefault((delay_s, streams), []).append(found["tokens_per_s"])
                        row = {"delay_s": delay_s, "streams": streams, "tokens_per_s": round(found["tokens_per_s"], 2)}
                        row["batches_in_flight"] = found["batches_in_flight"]
                        print(json.dumps(row), flush=True)
                finally:
                    process.close(30.0)
    rate = {key: statistics.median(several) for key, several in rates.items()}
    for delay_s in (0.005, 0.05):
        ms = f"{1000 * delay_s:g} ms"
        ratios[f"{ms}: 16 streams / without delay"] = rate[delay_s, 16] / rate[0.0, 16]
        ratios[f"{ms}: a token of one stream / its limit"] = (1 / rate[delay_s, 1]) / (1 / rate[0.0, 1] + 3 * delay_s)
        goals |= {f"{ms}: 16 streams / without delay": 0.8, f"{ms}: a token of one stream / its limit": 1.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, at two links only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default="pipeline,loss,replicas,planned,serving")
    parser.add_argument("--links", default=",".join(map(str, range(len(LINKS)))), help="numbers of links, from 0")
    options = parser.parse_args()
    names = [list(LINKS)[int(i)] for i in options.links.split(",")]
    if options.quick:
        names = [list(LINKS)[i] for i in (0, 2)]
    ratios: dict[str, float] = {}
    goals: dict[str, float] = {}
    if "pipeline" in options.parts:
        pipeline(1 if options.quick else options.rounds, ratios, goals, names)
    if "loss" in options.parts:
        losses(10 if options.quick else 100, ratios, goals)
    if "replicas" in options.parts:
        replicas(32 if options.quick else 64, ratios, goals)
    if "planned" in options.parts:
        planned(1 if options.quick else options.rounds, ratios, goals)
    if "serving" in options.parts:
        serving(1 if options.quick else max(2, options.rounds // 2), ratios, goals)
    conclude("slow_links", ratios, goals, at_most=[g for g in goals if "loss" in g or g.endswith("its limit")])


if __name__ == "__main__":
    main()
