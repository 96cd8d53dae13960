"""Models as functions, as `model: tests.unit.serving.predicted:two_towers` names them."""

from typing import Any

import torch
from torch import nn

from tests.unit.graph.zoo import MultiTask, ResNet
from tests.unit.models import TwoTower

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Looked(nn.Module):
    """A table looked up in a way that no bound can be seen of, times a vector; and whether that is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(10, 4)), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.out(self.table[ids] * scale)
        return x, x > 0


def two_towers() -> Example:
    torch.manual_seed(1)
    return TwoTower(), (), {"user": torch.zeros(4, 6), "item": torch.zeros(4, 5)}


def empty_towers() -> Example:
    with torch.device("meta"):
        return two_towers()


def resnet() -> Example:
    torch.manual_seed(2)
    module = ResNet()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module, (torch.zeros(4, 3, 16, 16),), {}


def several_heads() -> Example:
    torch.manual_seed(3)
    return MultiTask(), (torch.zeros(4, 8),), {}


def looked_up() -> Example:
    torch.manual_seed(4)
    return Looked(), (torch.zeros(4, dtype=torch.long), torch.zeros(4, 4)), {}


def transposed() -> Example:
    class Transposed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2).t()

    return Transposed(), (torch.zeros(4, 3),), {}
