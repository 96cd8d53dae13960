import argparse
import copy
import math
import optparse
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import CheckpointError, Infeasible
from nesa_ray.graph.attention import scaled_dot_product
from nesa_ray.graph.models import capture_ref
from nesa_ray.graph.split import Instruction, StageModule
from nesa_ray.serving.blueprint import capture_served, draw, plan_for
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.products import Int8Product, packs
from nesa_ray.serving.packing import Operator, grouped_products, merge, pack, products
from nesa_ray.serving.quantised import (
    TINY,
    Int8Weight,
    bind_product,
    int8_product,
    quantise,
    quantise_groups,
    quantise_products,
)
from nesa_ray.serving.stages import LocalStages
from tests.unit.serving.conftest import FAMILIES, Model, start, whole


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 32), st.integers(1, 12), st.integers(1, 400), st.integers(-44, 38), st.integers(0, 6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_errors_are_within_the_stated_bound(
    seed: int, outputs: int, inputs: int, exponent: int, spikes: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (exponent + torch.randint(-3, 3, (outputs, 1), generator=g)).double()
    w = torch.randn(outputs, inputs, generator=g, dtype=torch.float64) * sizes
    w[:, torch.randint(inputs, (spikes,), generator=g)] *= 1000
    w[torch.rand(outputs, generator=g) < 0.2] = 0
    w = w.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    made = quantise(w)
    outlying = torch.zeros(inputs, dtype=torch.bool)
    outlying[made.columns] = True
    assert len(made.columns) <= math.ceil(inputs / 100)
    error = (made.dequantised(torch.float64) - w.double()).abs()
    magnitude = w.double().abs()
    assert bool((error[:, ~outlying] <= magnitude[:, ~outlying].amax(1, keepdim=True) / 253 + TINY).all())
    assert bool((error[:, outlying] <= magnitude[:, outlying] / 256 + TINY).all())


def test_outlier_columns_are_those_that_make_rows_coarse() -> None:
    w = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    assert len(quantise(w).columns) == 0
    w[:, 500] *= 40
    w[5, 700] = 60
    made = quantise(w)
    assert made.columns.tolist() == [500, 700]
    assert float((made.dequantised(torch.float32) - w).abs().max()) < 0.3
    w[:, :30] = 50 * torch.randn(64, 30)
    assert len(quantise(w).columns) == 10
    w[3, 3] = math.nan
    with pytest.raises(CheckpointError, match="weight: has values that aren't finite"):
        quantise(w)


def with_outliers(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    w[:, inputs // 3] *= 50
    return w


def call(kernel: Callable[..., torch.Tensor], x: torch.Tensor, w: Int8Weight, bias: torch.Tensor | None) -> Any:
    return kernel(x, w.values, w.scales, w.outliers, w.columns, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 64, 32), (1, 100, 33), (2, 200, 7), (5, 513, 70), (19, 320, 130), (8, 128, 64), (40, 513, 70)],
)
def test_a_product_is_that_of_the_dequantised_weight(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    made = quantise(with_outliers(outputs, inputs, rows))
    assert len(made.columns) > 0
    x = torch.randn(1, rows, inputs, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 30
    x[:, rows // 2] *= 1e-3
    x, bias = x.to(dtype), torch.randn(outputs).to(dtype)
    weight = made.dequantised(torch.float64)
    exact = x.double() @ weight.t() + bias.double()
    terms = x.double().abs() @ weight.abs().t() + bias.double().abs()
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert bool(((call(int8_product, x, made, bias).double() - exact).abs() <= rounding * terms).all())
    if kernels() is None:
        return
    got = call(Int8Product(dtype), x, made, bias)
    integers = x.double().abs().amax(-1, keepdim=True) / 65000 * weight.abs().sum(1)
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= integers + 1e-6 * terms + rounding * exact.abs()).all())
    for row in range(rows):
        assert torch.equal(call(Int8Product(dtype), x[:, row], made, bias), got[:, row])
    nothing = call(Int8Product(dtype), torch.zeros_like(x), made, None)
    assert not bool(nothing.any())


def bind(step: Instruction) -> Any:
    product = bind_product(step.target, torch.float32, native=kernels() is not None)
    return product or (lambda *a: scaled_dot_product(*a[:-1], 0.0))


def dequantised_groups(weights: torch.Tensor) -> torch.Tensor:
    parts = quantise_groups(weights, "experts")
    groups = (Int8Weight(**{n: t[g] for n, t in parts.items()}) for g in range(len(weights)))
    return torch.stack([g.dequantised(torch.float32) for g in groups])


def test_groups_have_as_many_outliers_each_and_errors_within_the_bound() -> None:
    weights = torch.stack([with_outliers(70, 200, 0), torch.randn(70, 200), torch.zeros(70, 200)])
    parts = quantise_groups(weights, "experts")
    assert parts["columns"].shape == (3, 1)
    assert int(parts["columns"][0]) == 66
    error, most = (dequantised_groups(weights) - weights).abs(), weights.abs()
    most[0, :, 66] = 0
    assert bool((error[1:] <= most[1:].amax(2, keepdim=True) / 253 + TINY).all())
    error[0, :, 66] = 0
    assert bool((error[0] <= most[0].amax(1, keepdim=True) / 253 + TINY).all())
    weights[1, 3, 3] = math.inf
    with pytest.raises(CheckpointError, match=r"experts\[1\]: has values that aren't finite"):
        quantise_groups(weights, "experts")


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_a_quantised_program_computes_what_its_dequantised_weights_do(
    family: str, model: Callable[[str], Model]
) -> None:
    directory = str(model(family).directory)
    program, state = whole(capture_ref(directory, batch=1, tokens=8), directory, torch.float32)
    for name in {p.weight for p in products(program, state)}:
        state[name] = state[name].clone()
        state[name][:, 5] *= 20
    experts = {g.weight for g in grouped_products(program, state)}
    assert len(experts) == (2 * 3 if family == "mixtral" else 0)
    for name in experts:
        state[name] = state[name].clone()
        state[name][1, :, 5] *= 20

    def dense(weight: torch.Tensor, bias: torch.Tensor | None, _: str) -> Operator:
        tensors = {"weight": quantise(weight).dequantised(torch.float32)}
        return Operator(
            "aten.linear.default", tensors if bias is None else {**tensors, "bias": bias}, ("weight", "bias")
        )

    quantised, parts = quantise_products(program, dict(state), torch.float32)
    assert not products(quantised, parts)
    assert not grouped_products(quantised, parts)
    assert not experts & set(parts)
    assert max(t.shape[-1] for n, t in parts.items() if n.endswith(".columns")) == 1
    state |= {n: dequantised_groups(state[n]) for n in experts}
    ids = torch.randint(0, 320, (1, 13), generator=torch.Generator().manual_seed(0))  # one in eight errs by 1e-3
    positions = torch.arange(13)[None]
    with torch.inference_mode():
        made = merge(program, dict(state), products(program, state), "dense", dense)
        (expected,) = StageModule(*made, attention=bind)(ids, positions)
        (got,) = StageModule(quantised, parts, attention=bind)(ids, positions)
    assert float((got - expected).abs().max()) < 2e-3 * float(expected.abs().max())


def dequantise(*layers: torch.nn.Linear) -> None:
    """Those that have the same input are quantised as one."""
    joined = quantise(torch.cat([m.weight.detach() for m in layers])).dequantised(torch.float32)
    for m, w in zip(layers, joined.split([len(m.weight) for m in layers]), strict=True):
        m.weight.data = w


def test_experts_are_read_one_weight_at_a_time_and_nothing_is_kept_beside_int8(
    model: Callable[[str], Model],
) -> None:
    directory = str(model("mixtral").directory)
    program, state = whole(capture_ref(directory, batch=1, tokens=8), directory, torch.float32)
    experts = {n: state.pop(n) for n in [g.weight for g in grouped_products(program, state)]}
    dense = [weakref.ref(state[p.weight]) for p in products(program, state)]
    loaded: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(r() is not None for r in loaded)
        made = experts[name].clone()
        loaded.append(weakref.ref(made))
        return made

    quantised, parts = quantise_products(program, state, torch.float32, read)
    assert parts is state
    assert set(quantised.state) == set(parts)
    assert len(loaded) == len(experts)
    assert not any(r() is not None for r in (*loaded, *dense))


def test_packed_weights_are_not_kept_beside(model: Callable[[str], Model]) -> None:
    directory = str(model("mixtral").directory)
    program, state = whole(capture_ref(directory, batch=1, tokens=8), directory, torch.float32)
    given = [weakref.ref(state[p.weight]) for p in (*products(program, state), *grouped_products(program, state))]
    packed, parts = pack(program, state, torch.float32, torch.device("cpu"))
    assert set(packed.state) == set(parts)
    assert not any(r() is not None for r in given) or not packs(torch.float32)


def test_greedy_output_of_a_mixture_on_two_stages_doesnt_depend_on_the_cut(model: Callable[[str], Model]) -> None:
    said = []
    for cuts in ((), (0.4,)):
        engine = start(model("mixtral"), capture_served, *cuts, weights="int8")
        try:
            said.append(engine.generate(list(range(20)), temperature=0, max_tokens=24).token_ids)
        finally:
            engine.close()
    assert said[0] == said[1]


def test_greedy_output_is_that_of_the_dequantised_weights(model: Callable[[str], Model], tmp_path: Path) -> None:
    reference = copy.deepcopy(model("llama").reference)
    for m in reference.modules():
        if isinstance(m, torch.nn.Linear):
            m.weight.data[:, 5] *= 8
    reference.save_pretrained(tmp_path)
    for layer in reference.model.layers:
        a, f = layer.self_attn, layer.mlp
        for group in ((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (f.gate_proj, f.up_proj), (f.down_proj,)):
            dequantise(*group)
    dequantise(reference.lm_head)
    dequantised = Model(tmp_path, reference)
    engine = start(dequantised, capture_served, 0.3, 0.55, weights="int8")
    try:
        for text in ([5], list(range(40)), [7, 300, 12, 12, 9]):
            got = engine.generate(text, temperature=0, max_tokens=24, logprobs=1)
            assert got.token_ids == tuple(dequantised.generate(text, 24))
            with torch.no_grad():
                logits = reference(torch.tensor([[*text, *got.token_ids]])).logits[0, len(text) - 1 : -1]
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(got.token_ids)[:, None])[:, 0]
            assert [one.logprob for one in got.logprobs] == pytest.approx(expected.tolist(), abs=5e-3)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(transformers.LlamaConfig, {}), (transformers.MixtralConfig, {"num_local_experts": 4, "hidden_size": 512})],
)
def test_weights_take_half_the_memory_and_the_planner_knows(kind: Any, options: dict[str, int], tmp_path: Path) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2816, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = kind(**{**sizes, **layers, **options})
    module = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for p in module.parameters():
        if p.dim() >= 2:
            p.data = p.data**3 * 1e3  # heavy tails: as many outlier columns as there may be
    module.save_pretrained(tmp_path)
    whole_bytes = sum(p.nbytes for p in module.parameters())
    file = tmp_path / "cluster.json"
    device = Device(id="cpu0", kind="cpu", memory_bytes=0.6 * whole_bytes, flops_per_s=1e11, memory_bytes_per_s=1e10)
    topology = Topology((device,))
    topology.to_json(file)
    plain = ServeConfig(model=str(tmp_path), cluster=str(file), context=32)
    with pytest.raises(Infeasible):
        plan_for(plain, capture_served(plain), topology)
    served = ServeConfig(model=str(tmp_path), cluster=str(file), context=32, weights="int8")
    captured = capture_served(served)
    plan = plan_for(served, captured, topology)
    planned = sum(n.param_bytes for n in captured.graph.nodes)
    blueprint = draw(served, captured, plan, topology)
    stages = LocalStages(blueprint)
    try:
        held = sum(t.nbytes for t in stages.workers[0]._module.state_dict().values())
    finally:
        stages.close()
    assert held <= 0.55 * whole_bytes
    assert held <= planned <= 1.01 * held
    read = [sum(n.access_bytes for n in capture_served(c).graph.nodes) for c in (plain, served)]
    assert read[1] < read[0] - 0.45 * whole_bytes


def perplexity(module: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = []
    with torch.inference_mode():
        for ids in windows:
            (logits,) = module(ids[None, :-1], torch.arange(len(ids) - 1)[None])
            losses.append(torch.nn.functional.cross_entropy(logits[0], ids[1:]))
    return float(torch.stack(losses).mean().exp())


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.MixtralConfig])
def test_perplexity_stays_within_one_per_cent(kind: Any, tmp_path: Path) -> None:
    """A byte-level decoder, trained for seconds on one module of the standard library, asked about another."""
    text, held_out = (torch.tensor(list(Path(m.__file__).read_bytes())) for m in (argparse, optparse))
    torch.manual_seed(0)
    config = kind(
        vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.06,
    )  # fmt: skip
    module = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(150):
        ids = torch.stack([text[i : i + 65] for i in torch.randint(len(text) - 65, (8,)).tolist()])
        loss = torch.nn.functional.cross_entropy(module(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.save_pretrained(tmp_path)
    program, state = whole(capture_ref(tmp_path, batch=1, tokens=8), str(tmp_path), torch.float32)
    windows = held_out[: 128 * 60].view(60, 128)
    plain = perplexity(StageModule(program, state, attention=bind), windows)
    served = perplexity(StageModule(*quantise_products(program, dict(state), torch.float32), attention=bind), windows)
    assert plain < 18  # it has learnt: that of bytes by their frequency is above 25
    assert served != plain
    assert served == pytest.approx(plain, rel=0.01)
