"""What capture refuses, and how it says so; writes in place; the order of what it keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nesa_ray.errors import CaptureError
from nesa_ray.graph.capture import capture
from nesa_ray.graph.graph import Graph
from nesa_ray.runtime.local import LocalPipeline
from tests.unit.models import even_plan


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # here: the `if`
            return x
        return -x


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y * y.max().item()  # here: the `item`


class Overwriting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.add(x, 1, out=y)  # here: the `out`
        return y


@pytest.mark.parametrize(
    ("module", "marker"), [(Branching(), "the `if`"), (Reading(), "the `item`"), (Overwriting(), "the `out`")]
)
def test_a_refusal_is_one_line_that_names_the_models(module, marker):
    source, start = inspect.getsourcelines(type(module))
    number = start + next(i for i, text in enumerate(source) if marker in text)
    with pytest.raises(CaptureError) as refusal:
        capture(module, (torch.randn(4, 4),))
    said = str(refusal.value)
    assert "\n" not in said
    assert f'{__file__}", line {number}' in said or f"{__file__}:{number}" in said, said


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x.clone()) * self.scale


def _write_through_chunk(x: torch.Tensor) -> torch.Tensor:
    x.chunk(2, 1)[1].mul_(2)
    return x


def _write_then_read_an_older_view(x: torch.Tensor) -> torch.Tensor:
    row = x[1]
    x.add_(1)
    x[:, 2:4].zero_()
    return x + row


def _write_twice(x: torch.Tensor) -> torch.Tensor:
    row = x[0]
    row.mul_(3).add_(1)
    x.t()[4] = 5
    return x + row.sum()


def _write_a_copy(x: torch.Tensor) -> torch.Tensor:
    y = x.t().contiguous()
    y[0] = 7
    z = x.t().reshape(-1)
    z[:3] = 8
    return x + y.t() + z.sum()


def _write_permuted(x: torch.Tensor) -> torch.Tensor:
    x.view(2, 2, 6).permute(2, 0, 1)[1].copy_(torch.ones(2, 2))
    x.unsqueeze(0)[0, 3].fill_(9)
    return x.narrow(1, 0, 6)


@pytest.mark.parametrize(
    "function",
    [_write_through_chunk, _write_then_read_an_older_view, _write_twice, _write_a_copy, _write_permuted],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("stages", [1, 3])
def test_writes_in_place_mean_what_they_say(function, stages):
    torch.manual_seed(0)
    module, x = Wrapped(function), torch.randn(4, 6)
    captured = capture(module, (x,))
    local = LocalPipeline(captured, even_plan(captured, min(stages, len(captured.graph.nodes))))
    assert torch.equal(local(x), module(x))


def test_a_graph_survives_json_and_has_unique_names():
    captured = capture(Reading().linear, (torch.randn(2, 4),))
    assert Graph.from_dict(captured.graph.to_dict()) == captured.graph
