"""Training on the cluster: parameters equal one process's, the saved model loads, the job runs by the real commands."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from nesa_ray.cluster.local import LocalCluster
from nesa_ray.cluster.topology import Link, Topology
from nesa_ray.errors import CheckpointError, Infeasible, RuntimeFailure
from nesa_ray.graph.models import capture_ref, initial_model
from nesa_ray.planning.partition import partition
from nesa_ray.planning.schedule import Schedule
from nesa_ray.runtime.channel import Kind
from nesa_ray.runtime.checkpoint import load_state
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.data import PackedWindows, TrainBatches
from nesa_ray.training.trainer import Trainer
from tests.unit.models import relative_error

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = 64


@pytest.fixture(scope="module")
def settings(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A tiny decoder with tied embeddings, random tokens, two stages of two replicas."""
    directory = tmp_path_factory.mktemp("train")
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=True, eos_token_id=2, bos_token_id=1,
    ).save_pretrained(directory / "config")  # fmt: skip
    g = torch.Generator().manual_seed(0)
    for name, documents in (("train", 40), ("held_out", 8)):
        rows = [torch.randint(3, VOCABULARY, (50,), generator=g).tolist() for _ in range(documents)]
        pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), directory / f"{name}.parquet")
    return {
        "model": str(directory / "config"),
        "data": {"paths": [str(directory / "train.parquet")], "sequence_length": 16},
        "held_out": [str(directory / "held_out.parquet")],
        "output": str(directory / "out"),
        "cluster": str(measured),
        "stages": 2,
        "replicas": 2,
        "micro_batch_size": 2,
        "microbatches": 3,
        "schedule": "1f1b",
        "steps": 3,
        "warmup_steps": 1,
        "eval_windows": 6,
        "optimizer": {"lr": 0.003, "eps": 1e-6},
    }


def one_process(config: TrainConfig, model: torch.nn.Module) -> list[float]:
    """Trains the whole model on the same global batches by torch's AdamW; returns the losses."""
    windows = PackedWindows(config.data, vocab_size=VOCABULARY, eos_token_id=2)
    batches = TrainBatches(
        windows, global_batch_size=config.global_batch_size, micro_batch_size=config.global_batch_size
    )
    o = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.requires_grad and p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], betas=(o.beta1, o.beta2), eps=o.eps)
    losses = []
    for step in range(config.steps):
        (batch,) = batches.next_step()
        logits = model(input_ids=torch.from_numpy(batch.input_ids_BT)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels_BT).flatten())
        losses.append(loss.item())
        adamw.zero_grad()
        loss.backward()
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for g in adamw.param_groups:
            g["lr"] = Trainer.learning_rate(config, step)
        adamw.step()
    return losses


@pytest.mark.parametrize(
    "varied",
    [
        {"zero": 0, "clip_norm": 0.2},
        {"zero": 1, "clip_norm": 0.2},
        {"zero": 2},
        {"zero": 3, "clip_norm": 0.2, "schedule": "zero_bubble"},
        {"zero": 2, "clip_norm": 0.2, "schedule": "interleaved", "stages_per_device": 2},
        {"zero": 0, "replicas": 1, "microbatches": 4, "schedule": "interleaved", "stages_per_device": 2},
        {"zero": 0, "replicas": 1, "schedule": "interleaved", "stages_per_device": 3, "recompute": [1, 4]},
    ],
    ids=lambda varied: " ".join(map(str, varied.values())),
)
def test_parameters_equal_one_process(cluster: LocalCluster, settings: dict, tmp_path: Path, varied: dict) -> None:
    """With clip_norm (the norm is about 1 here) the gradients are clipped by the norm over all stages."""
    config = TrainConfig.from_dict({**settings, **varied, "output": str(tmp_path)})
    with Trainer(config, show_progress=False) as trainer:
        assert len(trainer.plan.stages) == 2 * (config.stages_per_device or 1)
        assert {len(s.devices) for s in trainer.plan.stages} == {config.replicas}
        assert len(trainer.pipeline.actors) == 2 * config.replicas
        seats = trainer.pipeline.placement.seat
        for seat, where in trainer.pipeline.where().items():
            assert where["node_id"] == seats[seat].node_id
            assert where["cores"] == list(seats[seat].device.cores)
        result = trainer.fit()
    whole = initial_model(LlamaConfig.from_pretrained(config.model), config.seed)
    losses = one_process(config, whole)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=1e-5)
    assert result.held_out_loss == pytest.approx(rows[-1]["held_out_loss"])
    assert set(rows[0]["stages"]) == {str(s.stage) for s in result.stages} == {str(s.id) for s in trainer.plan.stages}
    assert all(s.measured_s > 0 for s in result.stages)
    saved = AutoModelForCausalLM.from_pretrained(result.model)
    for name, p in whole.named_parameters():
        assert relative_error(saved.get_parameter(name), p) < 1e-5, name
    assert not [p for p in tmp_path.iterdir() if p.name not in ("metrics.jsonl", "plan.json", "model")]


def test_mixed_precision_equals_one_process_doing_the_same(
    cluster: LocalCluster, settings: dict, tmp_path: Path
) -> None:
    """bf16 copies of fp32 parameters, whose gradients add up in fp32; tied embeddings on both stages."""
    config = TrainConfig.from_dict({**settings, "precision": "bf16", "zero": 2, "output": str(tmp_path)})
    with Trainer(config, show_progress=False) as trainer:
        result = trainer.fit()
    model_config = LlamaConfig.from_pretrained(config.model)
    masters = initial_model(model_config, config.seed)
    windows = PackedWindows(config.data, vocab_size=VOCABULARY, eos_token_id=2)
    batches = TrainBatches(
        windows, global_batch_size=config.global_batch_size, micro_batch_size=config.micro_batch_size
    )
    o = config.optimizer
    groups = [
        {"params": [p for p in masters.parameters() if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in masters.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)
    for step in range(config.steps):
        adamw.zero_grad()
        several = batches.next_step()
        for batch in several:
            copy = initial_model(model_config, config.seed, torch.bfloat16)
            copy.load_state_dict(masters.state_dict())
            logits = copy(input_ids=torch.from_numpy(batch.input_ids_BT)).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels_BT).flatten())
            (loss / len(several)).backward()
            for p, q in zip(masters.parameters(), copy.parameters(), strict=True):
                p.grad = q.grad.float() if p.grad is None else p.grad + q.grad.float()
        for g in adamw.param_groups:
            g["lr"] = Trainer.learning_rate(config, step)
        adamw.step()
    before = initial_model(model_config, config.seed)
    saved = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    for name, p in masters.named_parameters():
        moved, expected = (m.detach() - before.get_parameter(name) for m in (saved.get_parameter(name), p))
        assert relative_error(moved, expected) < 0.1, name  # of what training changed
        assert saved.get_parameter(name).dtype is torch.float32


def test_encoded_over_slow_links(cluster: LocalCluster, settings: dict, measured: Path, tmp_path: Path) -> None:
    """Activations in int8, gradients in what `auto` picks: the loss stays within 1 % of one process's, links emulated.

    In the last steps the stages are told to send everything raw.
    """
    slow, steps = Link(bytes_per_s=3e5, latency_s=0.02), 12
    topology = replace(Topology.from_json(measured), default=slow, pairs={})
    topology.to_json(tmp_path / "slow.json")
    run = {**settings, "replicas": 1, "zero": 0, "steps": steps, "held_out": [], "timeline": 1,
           "cluster": str(tmp_path / "slow.json"), "emulate_links": True, "codec": "int8", "gradient_codec": "auto",
           "output": str(tmp_path / "out")}  # fmt: skip
    config = TrainConfig.from_dict(run)
    with Trainer(config, show_progress=False) as trainer:
        trainer.fit()
        trainer.pipeline.call("encode", False)
        raw = {s: of[0] for s, of in trainer.pipeline.call("steps", steps, [0.0], timed=True).items()}
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = one_process(config, initial_model(LlamaConfig.from_pretrained(config.model), config.seed))
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=0.01)
    assert [r["loss"] for r in rows] != pytest.approx(losses, rel=1e-6)
    events = json.loads((tmp_path / "out/timeline.json").read_text())["traceEvents"]
    encoded = [e for e in events if e.get("cat") == "send" and "wire_bytes" in e["args"]]  # not all when the step ended
    shrunk = {(e["name"].split()[0], e["args"]["wire_bytes"] / e["args"]["bytes"]) for e in encoded
              if e["args"]["bytes"] > 1000}  # fmt: skip
    assert {round(share, 2) for kind, share in shrunk if kind == "forward"} == {0.25}
    assert {round(share, 2) for kind, share in shrunk if kind == "gradient"} <= {0.11, 0.12, 0.13, 0.25}  # int4 or int8
    assert {share for kind, share in shrunk if kind == "weight"} == {1.0}
    assert all(r["sent_bytes"] < r["raw_bytes"] for r in rows)
    assert all(r["step_s"] > 4 * slow.latency_s + r["sent_bytes"] / 2 / slow.bytes_per_s for r in rows)
    messages = [m for r in raw.values() for m in r.messages if m.wire_bytes is not None]
    assert any(m.tag.kind is Kind.FORWARD for m in messages)
    assert all(m.wire_bytes == m.n_bytes for m in messages)
    check = rows[0]["codecs"]
    assert check["raw_loss"] == pytest.approx(check["loss"], rel=0.01)
    assert check["raw_loss"] != check["loss"]
    assert 0 < check["gradient_error"] < 0.2


def test_codecs_that_change_too_much_are_given_up(
    cluster: LocalCluster,
    settings: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("nesa_ray.training.trainer.MOST_GRADIENT_CHANGED", 1e-6)
    run = {**settings, "replicas": 1, "zero": 0, "steps": 3, "held_out": [], "codec": "int4"}
    with Trainer(TrainConfig.from_dict({**run, "output": str(tmp_path)}), show_progress=False) as trainer:
        trainer.fit()
    first, *others = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first["sent_bytes"] < first["raw_bytes"]
    assert all(r["sent_bytes"] == r["raw_bytes"] and "codecs" not in r for r in others)
    assert "everything goes raw from now on" in caplog.text


def test_adapters_on_a_frozen_base(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    """As one process trains peft's; resumed under another ZeRO stage, the same bytes; the base is left as it is."""
    base, out = tmp_path / "base", tmp_path / "out"
    initial_model(LlamaConfig.from_pretrained(settings["model"]), 7).save_pretrained(base)
    before = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in base.iterdir()}
    lora = {"rank": 4, "alpha": 16, "merge": True}
    run = {**settings, "model": str(base), "lora": lora, "steps": 4, "checkpoint_every": 2, "output": str(out)}
    config = TrainConfig.from_dict(run)
    with Trainer(config, show_progress=False) as trainer:
        (adapters,) = out.glob("nesa-ray-*/adapter")
        initial = load_file(adapters / "model.safetensors")
        digests = trainer.pipeline.call("frozen_digest")
        assert len(set(digests.values())) == 2
        trainer.fit()
        assert trainer.pipeline.call("frozen_digest") == digests
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in base.iterdir()} == before

    whole = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    peft.set_peft_model_state_dict(whole, {f"base_model.model.{n}": t for n, t in initial.items()})
    losses = one_process(config, whole)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=1e-5)
    saved = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    for name, p in whole.named_parameters():
        assert relative_error(saved.get_parameter(name), p) < 1e-5, name
    ids = torch.arange(VOCABULARY).reshape(4, -1)
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        assert relative_error(merged(ids).logits, saved(ids).logits) < 1e-5

    whole_run = (out / "adapter/adapter_model.safetensors").read_bytes()
    newest = out / "checkpoints/step-00000004"
    held = {n for f in newest.glob("*.safetensors") for n in load_file(f)}
    assert held == {f"{o}{n}" for n in initial for o in ("", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")}
    shutil.rmtree(newest)
    resumed = TrainConfig.from_dict({**run, "resume": True, "zero": 3, "lora": {**lora, "merge": False}})
    with Trainer(resumed, show_progress=False) as trainer:
        assert trainer.fit().model == str(out / "adapter")
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == whole_run
    other = TrainConfig.from_dict({**run, "resume": True, "lora": {"rank": 2}})
    with pytest.raises(CheckpointError, match=r"lora_A\.weight: needs the shape \[2, 64\] .*, it has \[4, 64\]"):
        Trainer(other, show_progress=False)
    assert not [p for p in out.iterdir() if p.name.startswith("nesa-ray-")]

    narrow = {**run, "precision": "bf16", "checkpoint_every": None, "output": str(tmp_path / "bf16")}
    with Trainer(TrainConfig.from_dict({**narrow, "lora": {**lora, "merge": False}}), show_progress=False) as trainer:
        digests = trainer.pipeline.call("frozen_digest")  # the base in bf16
        trainer.fit()
        assert trainer.pipeline.call("frozen_digest") == digests
    in_bf16 = [json.loads(line)["loss"] for line in (tmp_path / "bf16/metrics.jsonl").read_text().splitlines()]
    assert in_bf16 == pytest.approx(losses, rel=3e-3)
    adapter = load_file(tmp_path / "bf16/adapter/adapter_model.safetensors")
    for n, in_fp32 in load_file(out / "adapter/adapter_model.safetensors").items():
        assert adapter[n].dtype is torch.float32
        if "lora_B" in n:  # they begin at zero, and so lora_A's first gradients do
            assert relative_error(adapter[n], in_fp32) < 0.2, n


def test_recompute_where_memory_asks_for_it(
    cluster: LocalCluster, settings: dict, measured: Path, tmp_path: Path
) -> None:
    """Devices that hold the run only without its activations: the same losses, computed again."""
    captured = capture_ref(settings["model"], batch=16, tokens=16)
    topology = Topology.from_json(measured)
    planned = {
        again: partition(captured.graph, topology, mode="training", stages=2, replicas=2, zero=2, recompute=again)
        for again in (False, True)
    }
    room = 1.02 * max(s.memory_bytes for s in planned[True].stages)
    assert room < sum(s.memory_bytes for s in planned[False].stages) / 2  # no cut has less on both
    replace(topology, devices=tuple(replace(d, memory_bytes=room) for d in topology.devices)).to_json(
        tmp_path / "tight.json"
    )
    run = {**settings, "micro_batch_size": 16, "microbatches": 3, "steps": 2, "held_out": []}
    config = TrainConfig.from_dict({**run, "cluster": str(tmp_path / "tight.json"), "output": str(tmp_path / "out")})
    with Trainer(config, show_progress=False) as trainer:
        assert trainer.recompute
        trainer.fit()
    losses = one_process(config, initial_model(LlamaConfig.from_pretrained(config.model), config.seed))
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=1e-5)
    never = TrainConfig.from_dict({**run, "cluster": str(tmp_path / "tight.json"), "output": str(tmp_path / "no"),
                                   "recompute": []})  # fmt: skip
    with pytest.raises(Infeasible, match="memory"):
        Trainer(never, show_progress=False)


def test_planned_with_measured_operators(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    """With `auto`, whether one stage would be faster is looked at as well."""
    wanted = {"measure": True, "schedule": "auto", "steps": 1}
    config = TrainConfig.from_dict({**settings, **wanted, "output": str(tmp_path / "out")})
    with Trainer(config, show_progress=False) as trainer:
        assert {d.speed for d in trainer.topology.devices} != {1.0}
        device = trainer.topology.device
        fast = max(trainer.plan.devices, key=lambda d: device[d].speed)
        assert device[fast].flops_per_s == max(device[d].flops_per_s for d in trainer.plan.devices)
        result = trainer.fit()
    assert result.steps == 1
    assert result.advice is None or result.advice.startswith("don't pipeline: by simulation one stage on ")


class Fragile(torch.nn.Module):
    """Makes a NaN of windows that begin with `TRIGGER`; the layers after it belong to another stage."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.out = torch.nn.Linear(16, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        x = x + torch.log(1.5 - (ids[:, :1, None] == TRIGGER) * 2.0)  # a comment to find this line by
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.out(x)


TRIGGER = 7


def fragile() -> tuple[torch.nn.Module, tuple[torch.Tensor], dict]:
    torch.manual_seed(0)
    return Fragile(), (torch.zeros(2, 16, dtype=torch.long),), {}


@pytest.fixture
def fragile_settings(settings: dict, tmp_path: Path) -> dict:
    """Twelve windows of sixteen tokens a step; the second of three steps has one that begins with TRIGGER."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, VOCABULARY, (3 * 12 * 16 + 1,), generator=g)
    tokens[(12 + 5) * 16] = TRIGGER
    file = tmp_path / "fragile.parquet"
    pq.write_table(pa.table({"input_ids": pa.array([tokens.tolist()], pa.list_(pa.int32()))}), file)
    data = {"paths": [str(file)], "sequence_length": 16, "shuffle": False}
    return {**settings, "model": f"{__name__}:fragile", "vocab_size": VOCABULARY, "data": data, "held_out": []}


def test_a_step_whose_loss_is_not_finite_is_skipped(
    cluster: LocalCluster, fragile_settings: dict, tmp_path: Path
) -> None:
    config = TrainConfig.from_dict({**fragile_settings, "on_nan": "skip", "output": str(tmp_path / "out")})
    with Trainer(config, show_progress=False) as trainer:
        result = trainer.fit()
        first = next(n.name for n in trainer.captured.program.nodes if "log" in str(n.target))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] is None for r in rows] == [False, True, False]
    assert f"stage 0, {first}, micro-batch " in rows[1]["skipped"]
    assert "a comment to find this line by" in rows[1]["skipped"]
    saved = load_state(result.model, [n for n, _ in Fragile().named_parameters()])
    assert all(t.isfinite().all() for t in saved.values())


def test_a_loss_that_is_not_finite_stops_the_run(cluster: LocalCluster, fragile_settings: dict, tmp_path: Path) -> None:
    """It names the node; the checkpoint before it is whole."""
    settings = {**fragile_settings, "checkpoint_every": 1, "output": str(tmp_path / "out")}
    with (
        Trainer(TrainConfig.from_dict(settings), show_progress=False) as trainer,
        pytest.raises(RuntimeFailure, match=r"step 1: the loss is nan: the first NaN or inf is in stage 0, log"),
    ):
        trainer.fit()
    resumed = TrainConfig.from_dict({**settings, "resume": True, "on_nan": "skip"})
    with Trainer(resumed, show_progress=False) as trainer:
        trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"] is None) for r in rows] == [(0, False), (1, True), (2, False)]


def test_resumed_elsewhere_is_bit_identical(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    """Interrupted after two steps and resumed under another ZeRO stage: the losses of a run never stopped."""
    whole = TrainConfig.from_dict({**settings, "zero": 1, "steps": 4, "output": str(tmp_path / "whole")})
    part = {**settings, "zero": 1, "steps": 4, "checkpoint_every": 2, "output": str(tmp_path / "part")}
    with Trainer(whole, show_progress=False) as trainer:
        trainer.fit()
    interrupted = TrainConfig.from_dict({**part, "max_seconds": 1e-9, "checkpoint_every": 1})
    with Trainer(interrupted, show_progress=False) as trainer:
        assert trainer.fit().steps == 1
    (tmp_path / "part/checkpoints/step-00000009.partial").mkdir()  # what a crash while writing leaves
    with Trainer(TrainConfig.from_dict({**part, "zero": 3, "resume": True}), show_progress=False) as trainer:
        trainer.fit()
    rows = [
        [json.loads(r) for r in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "part")
    ]
    assert [r["step"] for r in rows[1]] == [0, 1, 2, 3]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    kept = sorted(p.name for p in (tmp_path / "part/checkpoints").glob("*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000009.partial"]


def test_watched(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    """One run that TensorBoard, Perfetto and Prometheus are told of."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = {"schedule": "zero_bubble", "clip_norm": 0.2, "timeline": 2, "tensorboard": True, "steps": 4}
    config = TrainConfig.from_dict({**settings, **watched, "output": str(tmp_path / "watched")})
    with Trainer(config, show_progress=False) as trainer:
        result = trainer.fit()
        schedule = trainer.schedule
    rows = [json.loads(line) for line in (tmp_path / "watched/metrics.jsonl").read_text().splitlines()]
    assert all(0 < r["efficiency"] <= 1 for r in rows)
    assert min(r["efficiency"] for r in rows[1:]) <= result.efficiency <= max(r["efficiency"] for r in rows[1:])
    scalars = EventAccumulator(str(tmp_path / "watched/tensorboard")).Reload()
    assert [e.value for e in scalars.Scalars("loss")] == pytest.approx([r["loss"] for r in rows])
    check_timeline(tmp_path / "watched/timeline.json", schedule, steps={1, 2}, replicas=2)
    exported = prometheus_samples({"ray_nesa_train_loss", "ray_nesa_train_stage_wait_s"}, run="watched", steps=4)
    assert exported["ray_nesa_train_loss", None] == pytest.approx(rows[-1]["loss"])
    assert exported["ray_nesa_train_stage_wait_s", "1"] == pytest.approx(rows[-1]["stages"]["1"]["wait_s"])


def check_timeline(file: Path, schedule: Schedule, *, steps: set[int], replicas: int) -> None:
    """Every action of the schedule in each step, every message at both its ends; nothing overlaps in a track.

    Inputs are sent in the step before.
    """
    spans = [e for e in json.loads(file.read_text())["traceEvents"] if e["ph"] == "X"]
    actions = sorted(e["name"].split()[0] for e in spans if "micro-batch" in e["args"])
    scheduled = [str(a) for rank in schedule.ranks.values() for a in rank]
    assert actions == sorted(scheduled * len(steps) * replicas)

    def of(span: dict) -> int:
        return span["args"]["step"]

    assert {of(e) for e in spans} == steps
    seats = len(schedule.ranks) * replicas
    ends = {c: sorted(e["name"] for e in spans if e["cat"] == c) for c in ("send", "receive", "reduce", "update")}
    inputs = {
        (c, step): sorted(e["name"] for e in spans if e["cat"] == c and e["name"].startswith("input") and of(e) == step)
        for c in ("send", "receive")
        for step in steps
    }
    for step in sorted(steps)[1:]:
        assert inputs["send", step - 1] == inputs["receive", step] != inputs["send", step]
    sent, received = ([n for n in ends[c] if not n.startswith("input")] for c in ("send", "receive"))
    assert sent == received
    assert {n.split()[0] for n in ends["send"]} == {
        "forward", "gradient", "input", "weight", "weight_gradient", "control"
    }  # fmt: skip
    assert len(ends["reduce"]) == len(ends["update"]) == seats * len(steps)
    assert all(e["args"]["bytes"] > 0 for e in spans if e["cat"] == "send")
    tracks: dict[tuple[int, int], list[dict]] = {}
    for e in spans:
        tracks.setdefault((e["pid"], e["tid"]), []).append(e)
    assert len(tracks) == 6 * seats
    for track in tracks.values():
        track.sort(key=lambda e: e["ts"])
        for before, after in itertools.pairwise(track):
            assert before["ts"] + before["dur"] <= after["ts"] + 1, (before, after)  # to a microsecond


def prometheus_samples(names: set[str], run: str, steps: int) -> dict[tuple[str, str | None], float]:
    """What this node exports of the run after its last step, by (name, stage); Ray passes it on every ten seconds."""
    node = next(n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    end = time.monotonic() + 40
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = {
            (s.name, s.labels.get("stage")): s.value for f in families for s in f.samples if s.labels.get("run") == run
        }
        if samples.get(("ray_nesa_train_steps_total", None)) == steps and names <= {name for name, _ in samples}:
            return samples
        assert time.monotonic() < end, samples
        time.sleep(0.5)


def test_interleaved_goes_on_as_another_schedule(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    """A step of two stages a device, three of one stage and another ZeRO stage: the parameters of one process."""
    part = {**settings, "steps": 4, "checkpoint_every": 1, "output": str(tmp_path)}
    interleaved = {**part, "schedule": "interleaved", "stages_per_device": 2, "max_seconds": 1e-9}
    with Trainer(TrainConfig.from_dict(interleaved), show_progress=False) as trainer:
        assert trainer.fit().steps == 1
    config = TrainConfig.from_dict({**part, "zero": 1, "resume": True})
    with Trainer(config, show_progress=False) as trainer:
        result = trainer.fit()
    assert result.steps == 3
    whole = initial_model(LlamaConfig.from_pretrained(config.model), config.seed)
    losses = one_process(config, whole)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(result.model)
    for name, p in whole.named_parameters():
        assert relative_error(saved.get_parameter(name), p) < 1e-5, name


def test_ray_job_submit(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        yaml.safe_dump({**settings, "cluster": None, "output": str(tmp_path / "out"), "replicas": 1, "steps": 50})
    )
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ray")), "job", "submit", "--",
            sys.executable, str(REPOSITORY / "jobs/train_lm.py"), str(file), "--set", "steps=2",
        ],
        env={**os.environ, **cluster.environment}, capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 steps" in done.stdout
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "out/model/config.json").is_file()


def test_too_few_devices(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    config = TrainConfig.from_dict({**settings, "stages": 3, "output": str(tmp_path / "out")})
    with pytest.raises(Infeasible, match="3 stages of 2 devices need 6 devices, the cluster has 4"):
        Trainer(config, show_progress=False)
    assert not (tmp_path / "out").exists()


def test_model_too_large_for_the_clusters_memory(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(settings["model"])
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 4096, 16384, 4
    config.save_pretrained(tmp_path / "large")
    large = {**settings, "model": str(tmp_path / "large" / "config.json"), "output": str(tmp_path / "out")}
    with pytest.raises(Infeasible, match="memory"):
        Trainer(TrainConfig.from_dict(large), show_progress=False)
    assert not (tmp_path / "out").exists()


def test_checkpoint_that_does_not_fit(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(settings["model"])
    initial_model(config, 0).save_pretrained(tmp_path / "model")
    config.num_hidden_layers = 4
    config.save_pretrained(tmp_path / "model")
    wanted = TrainConfig.from_dict(
        {**settings, "replicas": 1, "model": str(tmp_path / "model"), "output": str(tmp_path / "out")}
    )
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.3"):
        Trainer(wanted, show_progress=False)
    assert not (tmp_path / "out").exists()
