from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nesa_ray.errors import CaptureError
from nesa_ray.graph.capture import Captured, capture
from nesa_ray.graph.split import split
from nesa_ray.serving.blueprint import capture_served
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.rows import ROWS, prepare
from tests.unit.serving.conftest import FAMILIES, Model, cut


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_the_selection_is_right_behind_the_last_attention(
    family: str, share: float, model: Callable[[str], Model], captured: Callable[[ServeConfig], Captured]
) -> None:
    graph = captured(ServeConfig(model=str(model(family).directory)))
    served = prepare(graph, split(graph, cut(graph, share).stage_of))
    steps = [i for p in served.programs for i in p.instructions]
    last_attention = max(n for n, i in enumerate(steps) if i.target == "nesa.attention.default")
    matrix = [n for n, i in enumerate(steps) if i.target in ("aten.linear.default", "aten.addmm.default")]
    selections = [n for n, i in enumerate(steps) if i.target == "aten.index_select.default"]
    # what the last attention mixed, and the residual beside it: all that follows runs on the rows
    assert len(selections) == 2
    assert all(last_attention < n for n in selections)
    assert min(selections) < min(n for n in matrix if n > last_attention)
    assert not [i for i in steps if i.target == "aten.dropout.default" and i.args[2]]
    rows_users = {p.id for p in served.programs if ROWS in p.inputs}
    assert rows_users >= {
        p.id for p in served.programs for i in p.instructions if i.target == "aten.index_select.default"
    }


class Mixer(torch.nn.Module):
    """A decoder that mixes tokens otherwise than by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.conv = torch.nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.conv((self.embed(input_ids) + position_ids[..., None]).transpose(1, 2))


class OwnAttention(torch.nn.Module):
    """A decoder whose attention isn't the captured operator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + position_ids[..., None]
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def test_a_model_that_a_cache_cant_serve_is_refused(tmp_path: Path) -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph = capture(Mixer(), (ids, ids), dynamic_shapes=(both, both))
    with pytest.raises(CaptureError, match=r"conv1d.*mixes tokens"):
        prepare(graph, split(graph, cut(graph).stage_of))
    graph = capture(OwnAttention(), (ids, ids), dynamic_shapes=(both, both))
    with pytest.raises(CaptureError, match="attends without nesa::attention"):
        prepare(graph, split(graph, dict.fromkeys(graph.node_id.values(), 0)))
    static = capture(Mixer(), (ids, ids))
    with pytest.raises(CaptureError, match="dynamic token dimension"):
        prepare(static, split(static, cut(static).stage_of))
    embedding = capture(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    with pytest.raises(CaptureError, match="needs input_ids"):
        prepare(embedding, split(embedding, cut(embedding).stage_of))


def test_a_plan_for_training_has_the_same_nodes(model: Callable[[str], Model]) -> None:
    from nesa_ray.graph.models import capture_ref

    config = ServeConfig(model=str(model("llama").directory))
    served, trained = capture_served(config).graph, capture_ref(config.model, batch=4, tokens=64).graph
    assert [n.op for n in served.nodes] == [n.op for n in trained.nodes]
    assert served.edges == trained.edges
