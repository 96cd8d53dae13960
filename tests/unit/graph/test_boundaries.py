"""A model with parts that can't be traced, cut around them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from nesa_ray.errors import CaptureError
from nesa_ray.graph.capture import Captured, capture
from nesa_ray.graph.split import StageModule, split
from nesa_ray.runtime.local import LocalPipeline
from tests.unit.models import random_plan, relative_error


class Routed(nn.Module):
    """Chooses its branch by value, counts what it chose, and returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.3)
        self.register_buffer("chosen", torch.zeros(2, dtype=torch.long))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        first = x.sum().item() > 0
        if self.training:
            self.chosen[0 if first else 1] += 1
        y = self.a(x) if first else self.b(x)
        return {"y": self.drop(y) * scale, "norm": y.norm(dim=-1, keepdim=True)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(5, 6)
        self.routed = nn.ModuleList([Routed(), Routed()])
        self.after = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.before(x))
        for part in self.routed:
            out = part(x, scale=0.5)
            x = out["y"] + x * out["norm"]
        return self.after(x)


NAMES = ["routed.0", "routed.1"]


@pytest.fixture
def captured() -> tuple[Model, Captured]:
    torch.manual_seed(0)
    model = Model()
    return model, capture(model, (torch.randn(4, 5),), boundaries=NAMES)


def test_without_boundaries_it_is_refused():
    with pytest.raises(CaptureError, match=r"test_boundaries\.py:\d+"):
        capture(Model(), (torch.randn(4, 5),))


def test_each_boundary_is_one_node_with_its_own_parameters(captured):
    model, made = captured
    nodes = [n for n in made.graph.nodes if n.op == "nesa.module.default"]
    assert [n.param_bytes for n in nodes] == [4 * 2 * 42 + 16] * 2
    assert all(n.flops == 2 * 4 * 36 for n in nodes)
    assert all(n.saved_bytes > 0 for n in nodes)
    assert not model.routed[0].chosen.any()  # capturing ran a copy
    assert "forward" not in model.routed[0].__dict__


@pytest.mark.parametrize("seed", range(3))
def test_it_trains_like_the_whole(captured, seed):
    model, made = captured
    local = LocalPipeline(made, random_plan(made, 4, seed), copy.deepcopy(model.state_dict()))
    one = LocalPipeline(made, random_plan(made, 1, seed), copy.deepcopy(model.state_dict()))
    batches = [{"x": torch.randn(4, 5)} for _ in range(3)]

    def loss(results, _):
        return next(iter(results.values())).square().mean()

    mine, whole = local.step(batches, loss, seed=1), one.step(batches, loss, seed=1)
    assert torch.equal(torch.stack(mine), torch.stack(whole))
    for name, p in one.named_parameters():
        if p.grad is not None:
            assert relative_error(local.get_parameter(name).grad, p.grad) <= 1e-5, name
    assert torch.equal(local.get_buffer("routed.1.chosen"), one.get_buffer("routed.1.chosen"))
    assert local.get_buffer("routed.1.chosen").sum() == 3


def test_gradients_equal_the_modules_without_dropout(captured):
    model, _ = captured
    for part in model.routed:
        part.drop.p = 0.0
    x = torch.randn(4, 5)
    made = capture(model, (x,), boundaries=NAMES)
    local = LocalPipeline(made, random_plan(made, 3, 1), copy.deepcopy(model.state_dict()))
    expected = model(x)
    expected.square().mean().backward()
    got = local(x)
    got.square().mean().backward()
    assert torch.equal(got, expected)
    for name, p in model.named_parameters():
        other = local.get_parameter(name).grad
        assert (p.grad is None) == (other is None), name
        if p.grad is not None:
            assert relative_error(other, p.grad) <= 1e-5, name


def test_evaluation(captured):
    model, made = captured
    local = LocalPipeline(made, random_plan(made, 3, 2), copy.deepcopy(model.state_dict())).eval()
    x = torch.randn(4, 5)
    assert torch.equal(local(x), model.eval()(x))


def test_a_program_with_a_boundary_travels(captured):
    model, made = captured
    (program,) = split(made, dict.fromkeys(made.node_id.values(), 0))
    stage = StageModule(pickle.loads(pickle.dumps(program)), model.state_dict())
    x = torch.randn(4, 5)
    assert torch.equal(stage(x)[0], model.eval()(x))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nothing"], "has no submodule 'nothing'"),
        (["routed", "routed.0"], "routed.0 lies inside routed"),
        (["routed"], "routed isn't called"),
    ],
)
def test_what_it_refuses(names, said):
    with pytest.raises(CaptureError, match=said):
        capture(Model(), (torch.randn(4, 5),), boundaries=names)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model, x = Model(), torch.randn(4, 5)
    with pytest.raises(CaptureError, match=r"routed\.0 needs real weights"):
        capture(model, (x,), boundaries=NAMES)
