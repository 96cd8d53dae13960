"""Measured times add up to what stages really take, and are remembered."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from nesa_ray.errors import InvalidConfig
from nesa_ray.graph import measure as measuring
from nesa_ray.graph.capture import Captured, capture
from nesa_ray.graph.measure import measure
from nesa_ray.graph.models import capture_ref, initial_model
from nesa_ray.graph.split import StageModule, split
from nesa_ray.planning.plan import Plan
from tests.unit.graph.zoo import ResNet
from tests.unit.models import even_plan

Build = Callable[[Path], tuple[Captured, nn.Module, dict[str, torch.Tensor]]]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoder(directory: Path) -> tuple[Captured, nn.Module, dict[str, torch.Tensor]]:
    config = LlamaConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=1000)  # fmt: skip
    config.save_pretrained(directory)
    ids = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "position_ids": torch.arange(64).expand(4, 64)}
    return capture_ref(directory, batch=4, tokens=64), initial_model(config, 0), inputs


def resnet(_: Path) -> tuple[Captured, nn.Module, dict[str, torch.Tensor]]:
    x = torch.randn(8, 3, 32, 32)
    module = ResNet(16)
    return capture(module, (), {"pixel_values": x}), module, {"pixel_values": x}


class NormalisedUNet(nn.Module):
    """Three resolutions, group normalisation, nearest upsampling, skips by concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, width), self._block(width, 2 * width)
        self.middle = self._block(2 * width, 4 * width)
        self.up2, self.up1 = self._block(6 * width, 2 * width), self._block(3 * width, width)
        self.out = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _block(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, out, 3, 1, 1), nn.GroupNorm(4, out), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        m = self.middle(nn.functional.max_pool2d(b, 2))
        b = self.up2(torch.cat([nn.functional.interpolate(m, scale_factor=2.0), b], 1))
        return self.out(self.up1(torch.cat([nn.functional.interpolate(b, scale_factor=2.0), a], 1)))


def unet(_: Path) -> tuple[Captured, nn.Module, dict[str, torch.Tensor]]:
    x = torch.randn(4, 3, 32, 32)
    module = NormalisedUNet()
    return capture(module, (x,)), module, {"x": x}


def stage_seconds(
    captured: Captured, module: nn.Module, plan: Plan, inputs: dict[str, torch.Tensor], *, training: bool
) -> list[float]:
    """The least time of each stage on real values, each one repeated by itself, as on a device of its own."""
    given = {**captured.state, **dict(module.named_buffers()), **dict(module.named_parameters())}
    programs = split(captured, plan.stage_of)
    stages = [StageModule(p, {n: given[n].detach().clone() for n in p.state}) for p in programs]
    weights = {n: t for s in stages for n, t in (*s.named_parameters(), *s.named_buffers())}
    values, least = dict(inputs), []
    for stage in stages:
        arguments = [values[a].detach() for a in stage.program.arguments]
        least.append(min(one_pass(stage, weights, arguments, training=training) for _ in range(15)))
        values.update(zip(stage.program.returns, stage.run(weights, *arguments, seed=1), strict=True))
    return least


def one_pass(
    stage: StageModule, weights: dict[str, torch.Tensor], arguments: list[torch.Tensor], *, training: bool
) -> float:
    """Seconds of a forward, and a backward where training, as an executor runs them."""
    p = stage.program
    if training:
        arguments = [
            v.detach().requires_grad_() if a in p.differentiable else v
            for a, v in zip(p.arguments, arguments, strict=True)
        ]
    with torch.set_grad_enabled(training):
        start = time.thread_time()
        made = stage.run(weights, *arguments, seed=1 if training else None)
        seconds = time.thread_time() - start
        roots = [t for t in made if t.grad_fn is not None]
        gradients = [torch.ones_like(t) for t in roots]
        if roots:
            start = time.thread_time()
            torch.autograd.backward(roots, gradients)
            seconds += time.thread_time() - start
    return seconds


@pytest.mark.alone
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("build", [decoder, resnet, unet], ids=lambda b: b.__name__)
def test_stage_times_are_predicted_within_15_percent(build: Build, mode, tmp_path):
    torch.manual_seed(0)
    captured, module, inputs = build(tmp_path)
    plan = even_plan(captured, 3)
    errors: list[float] = []
    for _ in range(12):  # others may use this machine, and its caches: one quiet moment is enough
        seconds = measure(captured, mode=mode)
        predicted = [sum(seconds[n]["cpu"] for n in s.nodes) for s in plan.stages]
        real = stage_seconds(captured, module, plan, inputs, training=mode == "training")
        errors.append(max(abs(p / r - 1) for p, r in zip(predicted, real, strict=True)))
        if errors[-1] <= 0.15:
            break
    assert min(errors) <= 0.15, errors


def test_repeated_layers_are_timed_once_and_remembered_on_disk(tmp_path, monkeypatch):
    captured, _, _ = decoder(tmp_path)
    timed = []
    time_one = measuring._time
    monkeypatch.setattr(measuring, "_time", lambda p, *a, **k: timed.append(p) or time_one(p, *a, **k))
    first = measure(captured, mode="inference", cache=tmp_path / "cache")
    assert len(timed) == 3  # what comes before the layers, a layer, what comes after
    assert measure(captured, mode="inference", cache=tmp_path / "cache") == first
    assert len(timed) == 3
    measure(captured, mode="training", cache=tmp_path / "cache")
    assert len(timed) == 6


def test_a_spoiled_cache_file_is_measured_again(tmp_path):
    captured = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    measure(captured, mode="inference", cache=tmp_path)
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert measure(captured, mode="inference", cache=tmp_path)[0]["cpu"] > 0


def test_what_it_refuses():
    captured = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(InvalidConfig, match="mode: needs one of inference, training"):
        measure(captured, mode="fast")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidConfig, match="device: cuda isn't there"):
            measure(captured, mode="inference", device="cuda")
