"""int8 weights with outlier columns (serving/quantised.py) and our own packed ones, against oneDNN's, one core.

    python benchmarks/int8_weights.py [--quick] [--model DIR --tokens FILE.parquet]

Products of 1 to 256 rows with square weights, each time with another weight, of more in all than a processor's cache
holds; those of experts, where each row has one of 16 drawn for it, against the grouped product that transformers takes;
then bytes and held-out perplexity of a trained model, which `make demo` leaves in runs/demo.  Prints a JSON object per
arm and the ratios last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import moe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arms import conclude
from nesa_ray.graph.attention import scaled_dot_product
from nesa_ray.graph.models import capture_ref, read_config
from nesa_ray.graph.split import StageModule, StageProgram, split
from nesa_ray.runtime.checkpoint import load_state
from nesa_ray.serving.native.products import Grouped, Int8Product, PackedProduct, packs
from nesa_ray.serving.native.products import packed as packed_in_panels
from nesa_ray.serving.packing import grouped_products, products
from nesa_ray.serving.quantised import bind_product, quantise, quantise_groups, quantise_products
from nesa_ray.serving.rows import frozen
from nesa_ray.training.data import held_out_batches

GOALS = {"product_bytes_vs_bfloat16": 0.55, "perplexity_vs_bfloat16": 1.01}
AT_MOST = tuple(GOALS)
ROWS = (1, 4, 16, 64, 256)
EXPERTS, EXPERT_ROWS = 16, (2, 8, 64)
SEQUENCE, BATCH = 128, 4
Product = Callable[[torch.Tensor], torch.Tensor]
Grouping = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def packed(weight: torch.Tensor, dtype: torch.dtype) -> Product:
    """By oneDNN: what torch has for it."""
    w = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


def panels(weight: torch.Tensor, dtype: torch.dtype) -> Product:
    """As a stage does it where the kernel is the fastest (serving/packing.py)."""
    w, kernel, outputs = packed_in_panels(weight.to(dtype)), PackedProduct(dtype), len(weight)
    return lambda x: kernel(x, w, None, outputs)


def quantised(weight: torch.Tensor, dtype: torch.dtype) -> Product:
    """As a stage does it."""
    q, kernel = quantise(weight), Int8Product(dtype)
    return lambda x: kernel(x, q.values, q.scales, q.outliers, q.columns, None)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ARMS = {
    "float32": (packed, torch.float32),
    "bfloat16": (packed, torch.bfloat16),
    "int8_float32": (quantised, torch.float32),
    "int8_bfloat16": (quantised, torch.bfloat16),
} | {f"panels_{name}": (panels, d) for name, d in DTYPES.items() if packs(d)}


def speeds(width: int, count: int, rounds: int) -> dict[str, dict[int, float]]:
    """Arm -> rows -> seconds of a product; arms take turns."""
    torch.manual_seed(0)
    weights = []
    for _ in range(count):
        weight = torch.randn(width, width)
        weight[:, torch.randperm(width)[: width // 100]] *= 20  # as many outlier columns as there may be
        weights.append(weight)
    arms = {name: itertools.cycle([make(w, dtype) for w in weights]) for name, (make, dtype) in ARMS.items()}
    took: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in ARMS}
    for _, rows, name in itertools.product(range(rounds), ROWS, ARMS):
        x = torch.randn(rows, width).to(ARMS[name][1])
        for _ in range(count if rows < 64 else max(2, count // 8)):
            multiply = next(arms[name])
            began = time.perf_counter()
            multiply(x)
            took[name][rows].append(time.perf_counter() - began)
    return {name: {rows: statistics.median(s) for rows, s in each.items()} for name, each in took.items()}


def torch_grouped(weights: torch.Tensor, dtype: torch.dtype) -> Grouping:
    """As transformers has it, and as it is captured."""
    w = weights.to(dtype).transpose(1, 2)
    if dtype == torch.bfloat16:
        return lambda x, offsets: moe._grouped_mm(x, w, offsets)
    return lambda x, offsets: moe._grouped_mm_fallback(x, w, offsets)


def grouped_panels(weights: torch.Tensor, dtype: torch.dtype) -> Grouping:
    """As a stage does it."""
    w = torch.stack([packed_in_panels(one) for one in weights.to(dtype)])
    kernel, outputs = Grouped(PackedProduct(dtype)), weights.shape[1]
    return lambda x, offsets: kernel(x, offsets, outputs, w, None, outputs)


def grouped_quantised(weights: torch.Tensor, dtype: torch.dtype) -> Grouping:
    """As a stage does it."""
    parts = tuple(quantise_groups(weights, "weight").values())
    kernel, outputs = Grouped(Int8Product(dtype)), weights.shape[1]
    return lambda x, offsets: kernel(x, offsets, outputs, *parts, None)


EXPERT_ARMS = {"torch": torch_grouped, "panels": grouped_panels, "int8": grouped_quantised}


def expert_speeds(width: int, rounds: int) -> dict[str, dict[int, float]]:
    """Arm and dtype -> rows -> seconds of a grouped product [rows, width] · 16 x [2 width, width]; arms take turns."""
    torch.manual_seed(0)
    arms: dict[str, tuple[torch.dtype, list[Grouping]]] = {}
    weights = [torch.randn(EXPERTS, 2 * width, width) for _ in range(3)]
    for d, (name, make) in itertools.product(DTYPES, EXPERT_ARMS.items()):
        if name != "panels" or packs(DTYPES[d]):
            arms[f"{name} {d}"] = DTYPES[d], [make(w, DTYPES[d]) for w in weights]
    took: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in EXPERT_ROWS} for name in arms}
    for turn, rows in itertools.product(range(4 * rounds), EXPERT_ROWS):
        chosen = torch.randint(EXPERTS, (rows,)).float()
        offsets = torch.histc(chosen, EXPERTS, 0, EXPERTS - 1).cumsum(0).int()
        for name, (dtype, made) in arms.items():
            x = torch.randn(rows, width).to(dtype)
            began = time.perf_counter()
            made[turn % len(made)](x, offsets)
            took[name][rows].append(time.perf_counter() - began)
    return {name: {rows: statistics.median(s) for rows, s in each.items()} for name, each in took.items()}


def bind(step: Any) -> Any:
    """Attention without a cache, and the int8 products."""
    product = bind_product(step.target, torch.bfloat16, native=True)
    return product or (lambda *a: scaled_dot_product(*a[:-1], 0.0))


def perplexity(program: StageProgram, state: Mapping[str, torch.Tensor], batches: list[Any]) -> float:
    """Of the next token, over all batches."""
    module = StageModule(program, state, attention=bind)
    losses = []
    with torch.inference_mode():
        for batch in batches:
            ids, labels = torch.from_numpy(batch.input_ids_BT), torch.from_numpy(batch.labels_BT)
            (logits,) = module(ids, torch.arange(ids.shape[1])[None].expand_as(ids))
            losses.append(torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).item())
    return math.exp(statistics.mean(losses))


def quality(model: Path, tokens: Path, windows: int) -> dict[str, dict[str, float]]:
    """bfloat16 and int8 -> bytes of the state, and of the products' part of it, perplexity."""
    config = read_config(model)
    batches = held_out_batches(
        [str(tokens)], SEQUENCE, batch_size=BATCH, max_windows=windows,
        vocab_size=config.vocab_size, eos_token_id=config.eos_token_id,
    )  # fmt: skip
    captured = capture_ref(model, batch=BATCH, tokens=SEQUENCE, dtype=torch.bfloat16)
    (program,) = split(captured, dict.fromkeys(captured.node_id.values(), 0))
    program = frozen(program)
    constants = {n: t for n, t in captured.state.items() if not t.is_meta}
    state = load_state(model, [n for n in program.state if n not in constants])
    plain = {n: t.to(torch.bfloat16) for n, t in state.items()}
    multiplied = {p.weight for p in (*products(program, state), *grouped_products(program, state))}
    arms = {"bfloat16": (program, plain), "int8": quantise_products(program, dict(state), torch.bfloat16)}
    return {
        name: {
            "bytes": float(sum(t.nbytes for t in held.values())),
            "product_bytes": float(sum(t.nbytes for n, t in held.items() if n in multiplied or n not in state)),
            "perplexity": perplexity(p, {**held, **constants}, batches),
        }
        for name, (p, held) in arms.items()
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--tokens", type=Path, default=Path("runs/demo/corpus/tokens/held_out.parquet"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    width = 1024 if options.quick else 2048
    took = speeds(width, 16 if options.quick else 24, 1 if options.quick else 5)
    for name, each in took.items():
        milliseconds = {str(rows): round(1e3 * s, 3) for rows, s in each.items()}
        print(json.dumps({"arm": name, "weight": f"{width} x {width}", "ms_by_rows": milliseconds}), flush=True)
    ratios = {f"{n}_row{'s' * (n > 1)}_vs_{d}": round(took[d][n] / took[f"int8_{d}"][n], 3)
              for n in ROWS for d in DTYPES}  # fmt: skip
    ratios |= {f"panels_{n}_row{'s' * (n > 1)}_vs_{d}": round(took[d][n] / took[f"panels_{d}"][n], 3)
               for n in ROWS for d in DTYPES if f"panels_{d}" in took}  # fmt: skip
    experts = expert_speeds(512 if options.quick else 1024, 1 if options.quick else 6)
    for name, each in experts.items():
        milliseconds = {str(rows): round(1e3 * s, 3) for rows, s in each.items()}
        print(json.dumps({"arm": f"experts, {name}", "experts": EXPERTS, "ms_by_rows": milliseconds}), flush=True)
        kind, dtype = name.split()
        if kind != "torch":
            plain = experts[f"torch {dtype}"]
            ratios |= {f"experts_{kind}_{n}_rows_vs_{dtype}": round(plain[n] / each[n], 3) for n in EXPERT_ROWS}
    if (options.model / "config.json").is_file() and options.tokens.is_file():
        found = quality(options.model, options.tokens, 32 if options.quick else 256)
        for name, values in found.items():
            print(json.dumps({"arm": name, "model": str(options.model), **values}), flush=True)
        for what in ("bytes", "product_bytes", "perplexity"):
            ratios[f"{what}_vs_bfloat16"] = round(found["int8"][what] / found["bfloat16"][what], 5)
    else:
        print(json.dumps({"skipped": f"perplexity: no model in {options.model} with tokens in {options.tokens}"}))
    conclude("int8_weights", ratios, GOALS, AT_MOST)


if __name__ == "__main__":
    main()
