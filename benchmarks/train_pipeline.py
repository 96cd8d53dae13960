"""Training a decoder in two stages of one thread each: ours, torch.distributed.pipelining, DeepSpeed, one process.

Then once more ours, with something else busy on the second core: planned for that, and split evenly.

    python benchmarks/train_pipeline.py [--quick] [--rounds N] [--steps N] [--arms ours,torch,...]

All arms train the same weights on the same batches; their losses are compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms import Arm, ProcessArm, conclude, interleave, median_ratio
from benchmarks.decoder import LAYERS, MICRO_BATCH, MICRO_BATCHES, TOKENS, batch, decoder, loss

LEARNING_RATE = 1e-3


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def one_process(rank: int, port: int) -> Callable[[int], float]:
    """Gradient accumulation over the micro-batches, as many threads as the process has cores."""
    model, state = decoder(), {"step": 0}
    optimizer = _adamw(model.parameters())

    def run(steps: int) -> float:
        for _ in range(steps):
            total = 0.0
            ids, labels = batch(state["step"])
            state["step"] += 1
            for x, y in zip(ids.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True):
                one = loss(model(x), y) / MICRO_BATCHES
                one.backward()
                total += float(one)
            optimizer.step()
            optimizer.zero_grad()
        return total

    return run


def torch_pipelining(rank: int, port: int, host: str = "127.0.0.1") -> Callable[[int], float | None]:
    """torch.distributed.pipelining: 1F1B over gloo."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    dist.init_process_group("gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=2)
    layers, half = list(decoder()), 1 + LAYERS // 2
    mine = torch.nn.Sequential(*(layers[:half] if rank == 0 else layers[half:]))
    stage = PipelineStage(mine, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss)
    optimizer, state = _adamw(mine.parameters()), {"step": 0}

    def run(steps: int) -> float | None:
        losses: list[torch.Tensor] = []
        for _ in range(steps):
            ids, labels = batch(state["step"])
            state["step"] += 1
            losses = []
            if rank == 0:
                schedule.step(ids)
            else:
                schedule.step(target=labels, losses=losses)
            optimizer.step()
            optimizer.zero_grad()
        return float(torch.stack(losses).mean()) if losses else None

    return run


def deepspeed_pipeline(rank: int, port: int) -> Callable[[int], float | None]:
    """DeepSpeed's PipelineEngine over gloo."""
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
         "DS_ACCELERATOR": "cpu"}
    )  # fmt: skip
    import logging

    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.pipe import PipelineModule

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    layers = list(decoder())
    module = PipelineModule(layers, num_stages=2, loss_fn=loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_adamw([p for p in module.parameters() if p.requires_grad]),
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "steps_per_print": 1 << 30,
        },
    )
    state = {"step": 0}

    def run(steps: int) -> float | None:
        value = None
        for _ in range(steps):
            ids, labels = batch(state["step"])
            state["step"] += 1
            pairs = zip(ids.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True)
            value = engine.train_batch(iter([(x, y) for x, y in pairs]))
        return float(value) if value is not None and rank == 1 else None

    return run


def run_arms(make: Mapping[str, Callable[[], Arm]], rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Makes the arms, runs them in turn, ends them."""
    arms: dict[str, Arm] = {}
    try:
        for name, arm in make.items():
            arms[name] = arm()
        return interleave(arms, rounds, steps) if arms else {}
    finally:
        for one in arms.values():
            one.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--arms", default="ours,torch,deepspeed,threads1,threads2,unequal")
    options = parser.parse_args()
    rounds, steps = (2, 2) if options.quick else (options.rounds, options.steps)
    cores = sorted(os.sched_getaffinity(0))
    a, b = cores[0], cores[1 % len(cores)]
    from benchmarks.ours import OursArm, busy, even_cluster, local_cluster

    make: dict[str, Callable[[], Arm]] = {
        "ours": lambda: OursArm(predict=True),
        "torch": lambda: ProcessArm(torch_pipelining, [[a], [b]]),
        "deepspeed": lambda: ProcessArm(deepspeed_pipeline, [[a], [b]]),
        "threads1": lambda: ProcessArm(one_process, [[a]]),
        "threads2": lambda: ProcessArm(one_process, [[a, b]]),
    }
    with local_cluster([[a], [b]]):
        results = run_arms({n: make[n] for n in options.arms.split(",") if n != "unequal"}, rounds, steps)
    tokens = steps * MICRO_BATCHES * MICRO_BATCH * TOKENS
    rates = {name: [tokens / r["seconds"] for r in rows] for name, rows in results.items()}
    for name, rows in results.items():
        row = {"arm": name, "tokens_per_s": statistics.median(rates[name]), "all": [round(r, 1) for r in rates[name]]}
        extra = {k: v for k, v in rows[-1].items() if k != "seconds"}
        print(json.dumps(row | extra), flush=True)
    ratios: dict[str, float] = {}
    if "unequal" in options.arms.split(","):
        with tempfile.TemporaryDirectory() as directory, busy(b), local_cluster([[a], [b]], arms=2):
            even = str(even_cluster(Path(directory) / "cluster.json"))
            unequal = run_arms({"planned": OursArm, "even": lambda: OursArm(cluster=even)}, rounds, steps)
        speeds = {n: [tokens / r["seconds"] for r in rows] for n, rows in unequal.items()}
        for n, rows in unequal.items():
            extra = {"tokens_per_s": statistics.median(speeds[n]), "stages": rows[-1]["stages"]}
            print(json.dumps({"arm": f"half a core, {n}", **extra}), flush=True)
        ratios["unequal: planned / even"] = median_ratio(speeds["planned"], speeds["even"])
    ratios |= {f"ours / {n}": median_ratio(rates["ours"], rates[n]) for n in rates if n != "ours" and "ours" in rates}
    if "ours" in results:
        ratios["efficiency"] = statistics.median(r["efficiency"] for r in results["ours"])
        ratios["framework share"] = statistics.median(r["framework_share"] for r in results["ours"])
        ratios["driver share"] = statistics.median(r["driver_share"] for r in results["ours"])
        # The quickest of each: rounds differ by more than what is to be seen here where others use the machine.
        quickest = min(r["quickest_s"] for r in results["ours"]), min(r["predicted_s"] for r in results["ours"])
        ratios["step, measured / predicted"] = quickest[0] / quickest[1]
        ratios["misprediction"] = abs(ratios["step, measured / predicted"] - 1)
    goals = {
        "ours / torch": 1.15, "ours / deepspeed": 1.15, "ours / threads2": 1.0, "efficiency": 0.95,
        "framework share": 0.03, "driver share": 0.03, "misprediction": 0.15, "unequal: planned / even": 1.25,
    }  # fmt: skip
    conclude("train_pipeline", ratios, goals, at_most=["framework share", "driver share", "misprediction"])


if __name__ == "__main__":
    main()
