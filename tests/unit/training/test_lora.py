"""LoRA: adapters compute as peft's do, split models have the whole one's gradients, and only adapters are trained."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nesa_ray.errors import InvalidConfig
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.models import capture_ref, initial_model
from nesa_ray.planning.costing import derive_costs
from nesa_ray.runtime.local import LocalPipeline
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.lora import LoraConfig, add_adapters, initial_values, merged, write_adapter
from tests.unit.models import even_plan, random_plan, relative_error

VOCABULARY = 64
LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, tie_word_embeddings=True, attn_implementation="sdpa",
)  # fmt: skip
ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def captured_with(config: LoraConfig, directory: Path, llama: LlamaConfig = LLAMA) -> Captured:
    llama.save_pretrained(directory)
    return capture_ref(directory, batch=2, tokens=8, prepare=lambda module: add_adapters(module, config))


def values(captured: Captured, *, zero: bool) -> dict[str, torch.Tensor]:
    """Adapters; with `zero` as new ones are, else with random B."""
    made = initial_values({n: captured.state[n] for n in captured.trainable}, seed=0)
    g = torch.Generator().manual_seed(1)
    return made if zero else {n: t + torch.randn(t.shape, generator=g) / 8 for n, t in sorted(made.items())}


def written(adapters: dict[str, torch.Tensor], config: LoraConfig, directory: Path) -> Path:
    """The adapters as two stages would save them."""
    directory.mkdir()
    names = sorted(adapters)
    parts = [directory / "a.safetensors", directory / "b.safetensors"]
    for part, half in zip(parts, (names[:7], names[7:]), strict=True):
        save_file({n: adapters[n] for n in half}, part)
    write_adapter(directory, parts, config, base=None, task="CAUSAL_LM")
    return directory


@pytest.fixture
def base() -> LlamaForCausalLM:
    return initial_model(LLAMA, 0)


@pytest.mark.parametrize(
    ("targets", "stages", "schedule"),
    [
        ((), 1, "gpipe"),
        ((), 3, "zero_bubble"),
        (("q_proj", "layers.1.mlp.up_proj"), 4, "1f1b"),
        (("layers.2.mlp.down_proj",), 4, "zero_bubble"),  # stages with nothing to train
    ],
)
def test_output_and_gradients_equal_pefts(
    base: LlamaForCausalLM, tmp_path: Path, targets: tuple[str, ...], stages: int, schedule: str
) -> None:
    config = LoraConfig(rank=3, alpha=7.5, target_modules=targets)
    captured = captured_with(config, tmp_path / "config")
    adapters = values(captured, zero=False)
    whole = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), written(adapters, config, tmp_path / "adapter"), is_trainable=True
    )
    local = LocalPipeline(captured, random_plan(captured, stages, seed=stages), {**base.state_dict(), **adapters})
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (4, 2, 9), generator=g)
    positions = torch.arange(8).expand(2, 8)
    batches = [{"input_ids": i[:, :-1], "position_ids": positions, "labels": i[:, 1:]} for i in ids]

    def loss(results: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
        (logits,) = results.values()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets["labels"].flatten())

    losses = local.step(batches, loss, targets=["labels"], schedule=schedule)
    for batch, mine in zip(batches, losses, strict=True):
        expected = loss({"logits": whole(batch["input_ids"]).logits}, batch)
        assert relative_error(mine, expected.detach()) < 1e-6
        (expected / len(batches)).backward()
    theirs = {n.replace(".default", ""): p for n, p in whole.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in local.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{n}" for n in trained} == theirs.keys()
    for n, p in trained.items():
        assert relative_error(p.grad, theirs[f"base_model.model.{n}"].grad) < 1e-5, n


def test_merged_equals_pefts(base: LlamaForCausalLM, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, merge=True)
    adapters = values(captured_with(config, tmp_path / "config"), zero=False)
    directory = written(adapters, config, tmp_path / "adapter")
    mine = merged(base.state_dict(), directory, config)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).merge_and_unload().state_dict()
    assert mine.keys() == theirs.keys()
    for n, t in theirs.items():
        assert relative_error(mine[n], t) < 1e-6, n
    assert sum(not torch.equal(mine[n], t) for n, t in base.state_dict().items()) == 7 * LLAMA.num_hidden_layers


def test_default_targets_and_initial_values(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """All linear layers but the head; A is drawn by seed and name within Kaiming's bound, B is zero."""
    config = LoraConfig(rank=4)
    captured = captured_with(config, tmp_path / "config")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = {n.replace(".default", "") for n, p in theirs.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{n}" for n in captured.trainable}
    assert {n.split(".")[-3] for n in captured.trainable} == set(ALL)
    first = values(captured, zero=True)
    for n, t in first.items():
        assert torch.equal(t, values(captured, zero=True)[n])
        if n.endswith("lora_B.weight"):
            assert not t.any()
        else:
            assert 0.8 / t.shape[1] ** 0.5 < t.abs().max() <= 1 / t.shape[1] ** 0.5


def test_the_planner_knows_what_is_frozen(tmp_path: Path) -> None:
    """Frozen parameters cost their bytes once, trained ones as often as the optimizer asks, and no time to reduce."""
    captured = captured_with(LoraConfig(rank=4), tmp_path / "config")
    graph = captured.graph
    trained = sum(captured.state[n].nbytes for n in captured.trainable)
    assert sum(n.trained_bytes for n in graph.nodes) == trained
    base = sum(p.nbytes for p in initial_model(LLAMA, 0).parameters())
    assert sum(n.param_bytes for n in graph.nodes) == base + trained
    costed = derive_costs(graph, "training", replicas=2, zero=1)
    saved = sum(n.saved_bytes for n in graph.nodes)
    assert sum(n.memory_bytes for n in costed.nodes) == pytest.approx(base + 3.5 * trained + saved)
    linear = [n for n in graph.nodes if n.op == "aten.linear.default" and n.param_bytes]
    assert len(linear) == 3 * len(captured.trainable) / 2
    assert {costed.node[n.id].flops / n.flops for n in linear if n.frozen_bytes} == {2.0}
    assert {costed.node[n.id].flops / n.flops for n in linear if n.trained_bytes} == {3.0}


def test_dropout_is_of_training_alone(base: LlamaForCausalLM, tmp_path: Path) -> None:
    config = LoraConfig(rank=2, dropout=0.5)
    captured = captured_with(config, tmp_path / "config")
    state = {**base.state_dict(), **values(captured, zero=False)}
    ids = torch.randint(0, VOCABULARY, (2, 8))
    call = {"input_ids": ids, "position_ids": torch.arange(8).expand(2, 8), "use_cache": False}
    outputs = []
    for stages in (1, 3):
        local = LocalPipeline(captured, even_plan(captured, stages), state)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            outputs.append((local.train()(**call).logits, local.eval()(**call).logits))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert relative_error(*outputs[0]) > 1e-3


class Custom(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.proj, self.norm, self.head = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 5)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "train.lora: rank: needs an integer ≥ 1, got 0"),
        ({"alpha": -1}, "train.lora: alpha: needs a number > 0, got -1.0"),
        ({"dropout": 1}, "train.lora: dropout: needs a number from 0 to below 1, got 1.0"),
        ({"ranks": 4}, "train.lora: ranks: unknown field (did you mean 'rank'?)"),
        ({"target_modules": 3}, "train.lora: target_modules: needs a string, got 3"),
    ],
)
def test_settings_that_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(InvalidConfig) as e:
        TrainConfig.from_dict({"model": "m", "data": {"paths": ["x"]}, "output": "o", "lora": settings})
    assert str(e.value) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "target_modules: missing, Custom doesn't say which is its output head"),
        ({"target_modules": ("prj",)}, "target_modules: no module is named 'prj' (did you mean 'proj'?)"),
        ({"target_modules": ("embed",)}, "target_modules: embed is a Embedding, needs a Linear"),
        (
            {"target_modules": ("head",), "merge": True},
            "merge: head.weight is tied to embed.weight",
        ),
    ],
)
def test_targets_that_are_refused(settings: dict, said: str) -> None:
    module = Custom()
    with pytest.raises(InvalidConfig, match="norm keeps running statistics"):
        add_adapters(module, LoraConfig(target_modules=("proj",)))
    module.norm = torch.nn.Identity()
    with pytest.raises(InvalidConfig) as e:
        add_adapters(module, LoraConfig(**settings))
    assert str(e.value).startswith(f"train.lora: {said}")
    assert len(str(e.value).splitlines()) == 1
