"""Serving a decoder of about 100 M parameters on two cores: ours, as two stages of one thread, against transformers.

    python benchmarks/serve_llm.py [--quick] [--dtype float32|bfloat16]

Every arm runs in this one call, on the same weights and requests, with two threads in all.  Requests: prompts of 32-256
tokens, outputs of 32-128, greedy, token ids in and out.  Prints a JSON object per arm and the ratios last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import nesa_ray as nr
from nesa_ray.cluster.local import LocalCluster, LocalNode

GOALS = {"16_vs_static_batch": 1.5, "16_vs_continuous_batching": 2.0, "1_vs_generate": 1.0, "64_utilisation": 0.9}
VOCABULARY = 32_000


@dataclass(frozen=True)
class Load:
    """What one arm is asked for."""

    prompt: tuple[int, ...]
    output_tokens: int


def loads(count: int, seed: int, scale: float = 1.0) -> list[Load]:
    """Seeded requests."""
    rng = random.Random(seed)
    return [
        Load(
            tuple(rng.randrange(VOCABULARY) for _ in range(int(rng.randint(32, 256) * scale))),
            int(rng.randint(32, 128) * scale),
        )
        for _ in range(count)
    ]


def make_model(directory: Path, dtype: torch.dtype) -> None:
    """Random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=1024, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(directory)


def report(**values: Any) -> dict[str, Any]:
    """Prints one arm."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}), flush=True)
    return values


def ours(engine: nr.Engine, requests: list[Load], concurrency: int) -> dict[str, Any]:
    """A closed loop: as many requests as `concurrency` are always under way."""
    before = engine.stats()["stages"]
    first: list[float] = []

    def one(load: Load) -> None:
        done = threading.Event()
        asked = time.perf_counter()
        got = 0

        def sink(piece: Any) -> None:
            nonlocal got
            if isinstance(piece, Exception):
                raise piece
            if not got:
                first.append(time.perf_counter() - asked)
            got += len(piece.token_ids)
            if piece.finish is not None:
                done.set()

        from nesa_ray.serving.request import Sampling

        engine.submit(load.prompt, Sampling(temperature=0, max_tokens=load.output_tokens), sink)
        done.wait()
        assert got == load.output_tokens

    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(one, requests))
    wall_s = time.perf_counter() - began
    after = engine.stats()["stages"]
    cpu = [b["cpu_s"] - a["cpu_s"] for a, b in zip(before, after, strict=True)]
    busy = [(b["busy_s"] - a["busy_s"]) / wall_s for a, b in zip(before, after, strict=True)]
    steps = after[0]["steps"] - before[0]["steps"]
    tokens = sum(r.output_tokens for r in requests)
    return {
        "output_tokens_per_s": tokens / wall_s,
        "first_token_p50_s": sorted(first)[len(first) // 2],
        "utilisation": [round(b, 3) for b in busy],
        "stage_cpu_s": [round(c, 2) for c in cpu],
        "tokens_per_step": tokens / steps,
        "wall_s": wall_s,
    }


def static_batches(model: Any, requests: list[Load], size: int) -> dict[str, Any]:
    """transformers' generate on batches, padded on the left; each runs until its longest output is done."""
    began = time.perf_counter()
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        longest = max(len(r.prompt) for r in batch)
        ids = torch.tensor([[0] * (longest - len(r.prompt)) + list(r.prompt) for r in batch])
        mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
        tokens = max(r.output_tokens for r in batch)
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    wall_s = time.perf_counter() - began
    return {"output_tokens_per_s": sum(r.output_tokens for r in requests) / wall_s, "wall_s": wall_s}


def continuous_batching(directory: Path, dtype: torch.dtype, requests: list[Load]) -> dict[str, Any]:
    """transformers' own continuous batching; requests of one output length, as its interface takes one for all."""
    from transformers import GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="paged|sdpa").eval()
    tokens = sum(r.output_tokens for r in requests) // len(requests)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, num_blocks=512, max_batch_tokens=256
    )
    began = time.perf_counter()
    out = model.generate_batch([list(r.prompt) for r in requests], generation_config=config)
    wall_s = time.perf_counter() - began
    made = sum(len(o.generated_tokens) for o in out.values())
    return {"output_tokens_per_s": made / wall_s, "wall_s": wall_s}


def main() -> int:
    """Runs the arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute in all; ratios are rough")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    cores = sorted(os.sched_getaffinity(0))[:2]
    scale = 0.25 if options.quick else 1.0
    few, many = loads(16 if options.quick else 32, 1, scale), loads(64, 2, scale)
    one = loads(1 if options.quick else 3, 3, scale)
    measured: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        make_model(directory, dtype)
        nodes = [LocalNode(name="host", devices=2, cores=((cores[0],), (cores[-1],)), memory_bytes=4e9, spare_cpus=2)]
        with LocalCluster(nodes, dashboard=False) as cluster:
            cluster.connect()
            began = time.perf_counter()
            config = nr.ServeConfig(
                model=str(directory), stages=2, context=512, dtype=options.dtype, prefix_cache=False
            )
            with nr.Engine(config) as engine:
                report(arm="start", seconds=time.perf_counter() - began)
                ours(engine, loads(4, 9, 0.25), 4)
                for name, requests, concurrency in (("1", one, 1), ("16", few, 16), ("64", many, 64)):
                    measured[name] = ours(engine, requests, concurrency)
                    report(arm=f"nesa_ray, {name} concurrent", dtype=options.dtype, **measured[name])
        torch.set_num_threads(2)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        model.generation_config.pad_token_id = 0
        measured["static"] = static_batches(model, few, 16)
        report(arm="transformers generate, static batches of 16", dtype=options.dtype, **measured["static"])
        measured["generate"] = static_batches(model, one, 1)
        report(arm="transformers generate, one stream", dtype=options.dtype, **measured["generate"])
        del model
        try:
            measured["continuous"] = continuous_batching(directory, dtype, few)
            report(arm="transformers continuous batching", dtype=options.dtype, **measured["continuous"])
        except Exception as e:  # an arm of another project must not end ours
            report(arm="transformers continuous batching", error=f"{type(e).__name__}: {e}")

    def speed(arm: str) -> float:
        return float(measured.get(arm, {}).get("output_tokens_per_s", float("nan")))

    ratios = {
        "16_vs_static_batch": speed("16") / speed("static"),
        "16_vs_continuous_batching": speed("16") / speed("continuous"),
        "1_vs_generate": speed("1") / speed("generate"),
        "64_utilisation": min(measured["64"]["utilisation"]),
    }
    met = {k: ratios[k] >= goal for k, goal in GOALS.items()}
    shown = {k: round(v, 3) if v == v else None for k, v in ratios.items()}
    print(json.dumps({"benchmark": "serve_llm", "dtype": options.dtype, "ratios": shown, "goals": GOALS, "met": met}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
