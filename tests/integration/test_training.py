"""Training on the cluster: parameters equal one process's, the saved model loads, the job runs by the real commands."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from nesa_ray.cluster.local import LocalCluster
from nesa_ray.errors import CheckpointError, Infeasible
from nesa_ray.graph.models import initial_model
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
    ("zero", "schedule", "clip_norm"), [(0, "1f1b", 0.2), (1, "1f1b", 0.2), (2, "1f1b", None), (3, "zero_bubble", 0.2)]
)
def test_parameters_equal_one_process(
    cluster: LocalCluster, settings: dict, tmp_path: Path, zero: int, schedule: str, clip_norm: float | None
) -> None:
    """With clip_norm (the norm is about 1 here) the gradients are clipped by the norm over both stages."""
    config = TrainConfig.from_dict(
        {**settings, "zero": zero, "schedule": schedule, "clip_norm": clip_norm, "output": str(tmp_path)}
    )
    with Trainer(config, show_progress=False) as trainer:
        assert len(trainer.plan.stages) == 2
        assert {len(s.devices) for s in trainer.plan.stages} == {2}
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
    saved = AutoModelForCausalLM.from_pretrained(result.model)
    for name, p in whole.named_parameters():
        assert relative_error(saved.get_parameter(name), p) < 1e-5, name
    assert not [p for p in tmp_path.iterdir() if p.name not in ("metrics.jsonl", "plan.json", "model")]


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


def test_planned_with_measured_operators(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    config = TrainConfig.from_dict({**settings, "measure": True, "steps": 1, "output": str(tmp_path / "out")})
    with Trainer(config, show_progress=False) as trainer:
        assert {d.speed for d in trainer.topology.devices} != {1.0}
        device = trainer.topology.device
        fast = max(trainer.plan.devices, key=lambda d: device[d].speed)
        assert device[fast].flops_per_s == max(device[d].flops_per_s for d in trainer.plan.devices)
        assert trainer.fit().steps == 1


def test_resumed_elsewhere_is_bit_identical(cluster: LocalCluster, settings: dict, tmp_path: Path) -> None:
    """Interrupted after two steps and resumed under another ZeRO stage: the losses of a run never stopped."""
    settings = {**settings, "timeline": 2}
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
    events = json.loads((tmp_path / "whole/timeline.json").read_text())["traceEvents"]
    spans = [e["name"] for e in events if e["ph"] == "X"]
    assert {"0F0 forward", "1B2 backward", "reduce and update"} <= set(spans)
    assert spans.count("1F0 forward") == 2 * 2  # two steps, two replicas
    kept = sorted(p.name for p in (tmp_path / "part/checkpoints").glob("*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000009.partial"]


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
