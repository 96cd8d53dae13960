"""Serving a decoder of about 100 M parameters on two cores: ours, as two stages of one thread, against its peers.

    python benchmarks/serve_llm.py [--quick] [--rounds N] [--dtypes float32,bfloat16] [--parts engine,endpoint]
                                   [--loads 1,16,64,poisson]

engine    transformers' static batches, its continuous batching, and llama.cpp (pip install '.[bench-llama]', which
          compiles for four minutes), in turn, on the same weights and requests, two threads each.  Prompts of 32-256
          tokens, outputs of 32-128, greedy, token ids in and out.  1, 16 and 64 under way in a closed loop, and Poisson
          arrivals that offer 0.8 of what ours does with 64.
endpoint  what HTTP and Serve add to the engine, what an idle endpoint uses, and how long a start takes.

Prints a JSON object per arm and the ratios last: medians over the rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import nesa_ray as nr
from benchmarks.arms import ProcessArm, conclude
from benchmarks.serving_endpoint import SERVED, endpoint_part, two_cores
from benchmarks.serving_peers import PEERS, Answers, Load, Peer, Work, agreement, has_llama_cpp, write_gguf
from nesa_ray.cluster.local import LocalCluster
from nesa_ray.serving.pages import zeros
from nesa_ray.serving.request import Sampling

STATIC, CONTINUOUS, LLAMA_CPP = PEERS
VOCABULARY = 32_000
OURS = "nesa_ray"
GOALS = {STATIC: 1.5, CONTINUOUS: 2.0, LLAMA_CPP: 1.0}
WORKS = ("1", "16", "64", "poisson")
Stages = list[dict[str, float]]


def loads(count: int, seed: int, scale: float = 1.0) -> tuple[Load, ...]:
    """Seeded requests."""
    rng = random.Random(seed)
    return tuple(
        Load(
            tuple(rng.randrange(VOCABULARY) for _ in range(int(rng.randint(32, 256) * scale))),
            int(rng.randint(32, 128) * scale),
        )
        for _ in range(count)
    )


def arrivals(requests: Sequence[Load], tokens_per_s: float) -> tuple[float, ...]:
    """Poisson, at the rate that asks for so many output tokens a second."""
    rng, at = random.Random(4), [0.0]
    mean_s = statistics.mean(r.output_tokens for r in requests) / tokens_per_s
    for _ in requests[1:]:
        at.append(at[-1] + rng.expovariate(1 / mean_s))
    return tuple(at)


def make_model(directory: Path, dtype: torch.dtype) -> None:
    """Random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(directory)


def report(**values: Any) -> None:
    """Prints one arm."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def ours(engine: nr.Engine, work: Work) -> Answers:
    """The engine, called in this process; and what the stages did until the last request was taken up."""
    before = engine.stats()["stages"]
    answers, began = Answers(), time.perf_counter()
    free, done = threading.Semaphore(work.concurrency), threading.Semaphore(0)
    failed: list[Exception] = []
    for i, load in enumerate(work.requests):
        free.acquire()
        time.sleep(max(0.0, work.arrival(i) - (time.perf_counter() - began)))
        taken = time.perf_counter() - began

        def sink(piece: Any, request: int = i, asked: float = work.asked(i, taken)) -> None:
            if isinstance(piece, Exception):
                failed.append(piece)
            elif not answers.tokens.setdefault(request, []):
                answers.first_token_s.append(time.perf_counter() - began - asked)
            if not failed:
                answers.tokens[request] += piece.token_ids
            if failed or piece.finish is not None:
                free.release()
                done.release()

        engine.submit(load.prompt, Sampling(temperature=0, max_tokens=load.output_tokens), sink)
    answers.stages = stages_between(before, engine.stats()["stages"], time.perf_counter() - began)
    for _ in work.requests:
        done.acquire()
    if failed:
        raise failed[0]
    answers.wall_s = time.perf_counter() - began
    return answers


def stages_between(before: Stages, after: Stages, wall_s: float) -> dict[str, Any]:
    """What the stages did in between."""
    busy = [(b["busy_s"] - a["busy_s"]) / wall_s for a, b in zip(before, after, strict=True)]
    return {"utilisation": [round(b, 3) for b in busy], "steps": after[0]["steps"] - before[0]["steps"]}


def read_bytes_per_s(rank: int, port: int) -> Callable[[Any], float]:
    """What a core reads from memory while the others do as well: the median of several readings of 512 MiB.

    They lie as a stage's weights do.
    """
    x = zeros((1 << 27,), torch.float32, torch.device("cpu")).fill_(1.0)

    def measure(_: Any) -> float:
        seconds = []
        for _ in range(10):
            began = time.perf_counter()
            torch.sum(x)  # which reads fastest of torch's functions
            seconds.append(time.perf_counter() - began)
        return x.nbytes / statistics.median(seconds)

    return measure


def peer(make: Callable[[Path, torch.dtype], Peer], directory: Path, dtype: torch.dtype, rank: int, port: int) -> Peer:
    """What ProcessArm starts."""
    return make(directory, dtype)


def engine_part(
    directory: Path, dtype: torch.dtype, rounds: int, quick: bool, chosen: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Runs every arm under the chosen loads; the ratios and their goals."""
    name, scale = str(dtype).removeprefix("torch."), 0.25 if quick else 1.0
    cores = sorted(os.sched_getaffinity(0))[:2]
    works = {
        "1": Work(loads(1 if quick else 3, 3, scale), 1),
        "16": Work(loads(16 if quick else 32, 1, scale), 16),
        "64": Work(loads(80 if quick else 128, 2, scale), 64),
        "poisson": Work(loads(16 if quick else 48, 5, scale), 64),
    }
    weights = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    read_bytes = sum(p.nbytes for n, p in weights.named_parameters() if "embed_tokens" not in n)
    del weights
    peers = {n: make for n, make in PEERS.items() if n != LLAMA_CPP or has_llama_cpp()}
    if LLAMA_CPP in peers:
        write_gguf(directory, dtype)
    else:
        print("llama.cpp isn't installed: pip install '.[bench-llama]'", file=sys.stderr)
    config = nr.ServeConfig(model=str(directory), dtype=name, **SERVED)
    arms: dict[str, ProcessArm] = {}
    speeds: dict[tuple[str, str], list[float]] = {}
    used: list[float] = []
    read: list[float] = []
    with LocalCluster([two_cores()], dashboard=False) as cluster:
        cluster.connect()
        with nr.Engine(config) as engine:
            try:
                memory = ProcessArm(read_bytes_per_s, [[c] for c in cores])
                arms = {"memory": memory} | {
                    n: ProcessArm(partial(peer, make, directory, dtype), [cores]) for n, make in peers.items()
                }
                warm = Work(loads(4, 9, 0.25), 4)
                ours(engine, warm)
                for n in peers:
                    arms[n].ask(warm)
                for r in range(rounds):
                    for of in chosen:
                        work = works[of]
                        if of == "poisson":
                            offered = 0.8 * speeds["64", OURS][0]
                            work = Work(work.requests, work.concurrency, arrivals(work.requests, offered))
                        order = [OURS, *peers]
                        for arm in order[r % len(order) :] + order[: r % len(order)]:
                            print(f"round {r + 1}/{rounds}: {arm}, {of}   ", end="\r", file=sys.stderr, flush=True)
                            said: dict[str, Any] = {}
                            decodes = arm == OURS and of == "1"
                            bandwidth = [sum(memory.ask("read"))] if decodes else []
                            answers = ours(engine, work) if arm == OURS else arms[arm].ask(work)[0]
                            bandwidth += [sum(memory.ask("read"))] if decodes else []
                            speed = work.output_tokens / answers.wall_s
                            speeds.setdefault((of, arm), []).append(speed)
                            if arm == OURS:
                                reference = answers
                                said = dict(answers.stages)
                                if decodes:  # of decoding: from each request's first token to its last
                                    decoding_s = answers.wall_s - sum(answers.first_token_s)
                                    steps = work.output_tokens - len(work.requests)
                                    said["memory_share"] = read_bytes * steps / decoding_s / statistics.mean(bandwidth)
                                    read.append(said["memory_share"])
                                if of == "64":
                                    used.append(min(said["utilisation"]))
                            elif r == 0:
                                said["agreement"] = agreement(answers, reference)
                            if answers.first_token_s:
                                said["first_token_p50_s"] = statistics.median(answers.first_token_s)
                            report(arm=arm, load=of, dtype=name, round=r, output_tokens_per_s=speed, **said)
            finally:
                for arm in arms.values():
                    arm.close()
    ratios = {
        f"{name}, {of}, over {p}": statistics.median(
            a / b for a, b in zip(speeds[of, OURS], speeds[of, p], strict=True)
        )
        for of in chosen
        for p in peers
    }
    goals = {k: 1.0 if ", 1," in k else GOALS[k.split(", over ")[1]] for k in ratios if "poisson" not in k}
    goals.pop(f"{name}, 1, over {CONTINUOUS}", None)
    goals.pop(f"{name}, 1, over {LLAMA_CPP}", None)
    for what, seen, goal in ((f"{name}, 64, utilisation", used, 0.9), (f"{name}, 1, memory share", read, 0.8)):
        if seen:
            ratios[what], goals[what] = statistics.median(seen), goal
    return ratios, goals


def main() -> int:
    """Runs the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short requests, one round: ratios are rough")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--parts", default="engine,endpoint")
    parser.add_argument("--loads", default=",".join(WORKS), help="of the engine; poisson's rate is by what 64 reaches")
    options = parser.parse_args()
    chosen = options.loads.split(",")
    if unknown := set(chosen) - set(WORKS) or ({"poisson"} if "poisson" in chosen and "64" not in chosen else set()):
        parser.error(f"--loads: needs some of {', '.join(WORKS)}, poisson with 64; got {', '.join(sorted(unknown))}")
    rounds = 1 if options.quick else options.rounds
    ratios: dict[str, float] = {}
    goals: dict[str, float] = {}
    at_most: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.dtypes.split(","):
            directory = Path(temporary) / name
            make_model(directory, getattr(torch, name))
            if "engine" in options.parts:
                of_part = engine_part(directory, getattr(torch, name), rounds, options.quick, chosen)
                ratios, goals = ratios | of_part[0], goals | of_part[1]
        if "endpoint" in options.parts:
            measured, limits = endpoint_part(directory, loads(8 if options.quick else 32, 6, 0.5), rounds, ours)
            ratios, goals, at_most = ratios | measured, goals | limits, list(limits)
    conclude("serve_llm", {k: round(v, 4) for k, v in ratios.items()}, goals, at_most)
    return 0


if __name__ == "__main__":
    sys.exit(main())
