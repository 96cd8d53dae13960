from collections.abc import Callable
from dataclasses import replace

import pytest

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import CheckpointError, InvalidConfig, InvalidPlan
from nesa_ray.graph.capture import Captured
from nesa_ray.serving.blueprint import draw
from nesa_ray.serving.config import ServeConfig
from tests.unit.serving.conftest import Model, cut

Capture = Callable[[ServeConfig], Captured]
TOKEN_BYTES = 2 * 2 * 16 * 4  # keys and values of two heads of 16 float32, for one layer


def devices(*memory_bytes: float) -> Topology:
    return Topology(tuple(Device(id=f"cpu{i}", kind="cpu", memory_bytes=m) for i, m in enumerate(memory_bytes)))


def test_the_cache_fits_the_smallest_device(model: Callable[[str], Model], captured: Capture) -> None:
    config = ServeConfig(model=str(model("llama").directory), block_size=16)
    graph = captured(config)
    plan = cut(graph, 0.5)
    assert draw(config, graph, plan).blocks == 64 * 256 // 16
    layers = [len(s.attention) for s in draw(config, graph, plan).specs]
    weights = [sum(graph.graph.node[n].param_bytes for n in s.nodes) for s in plan.stages]
    small = weights[0] + 2 * 1000 * layers[0] * TOKEN_BYTES
    blueprint = draw(config, graph, plan, devices(small, 1e9))
    assert blueprint.blocks == 1000 // 16
    tight = draw(config, graph, plan, devices(weights[0] + 2 * 100 * layers[0] * TOKEN_BYTES, 1e9))
    assert (tight.context, tight.blocks) == (96, 6)
    for changed, says in (
        ({"context": 200}, "a sequence of 200 tokens needs"),
        ({"cache_bytes": 1 << 24}, "stage 0 needs"),
        ({"context": 300}, "at most 256 tokens"),
    ):
        with pytest.raises(InvalidConfig, match=says):
            draw(replace(config, **changed), graph, plan, devices(weights[0] + 1e5, 1e9))  # type: ignore[arg-type]


def test_a_plan_of_another_model_and_missing_weights_are_named(
    model: Callable[[str], Model], captured: Capture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    llama, gpt2 = (ServeConfig(model=str(model(f).directory)) for f in ("llama", "gpt2"))
    with pytest.raises(InvalidPlan, match="doesn't fit the captured graph"):
        draw(llama, captured(llama), cut(captured(gpt2), 0.5))
    empty = tmp_path_factory.mktemp("empty")
    (empty / "config.json").write_text((model("llama").directory / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"needs model\.safetensors"):
        draw(ServeConfig(model=str(empty)), captured(llama), cut(captured(llama)))
