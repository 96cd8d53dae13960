from collections.abc import Callable

import pytest
import torch

from nesa_ray.graph.attention import scaled_dot_product
from nesa_ray.graph.models import capture_ref
from nesa_ray.graph.split import Instruction, StageModule, split
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.fusion import GATE, NORM, ROTATION, TAKE, compute_once, fold_constants, fuse
from nesa_ray.serving.native.build import kernels
from nesa_ray.serving.native.chains import CHAINS
from nesa_ray.serving.native.products import packs
from nesa_ray.serving.packing import grouped_products, pack, products
from nesa_ray.serving.quantised import bind_product
from tests.unit.serving.conftest import FAMILIES, MORE_FAMILIES, Model, whole

LAYERS = 3
EXPECTED = {
    "llama": {NORM: 2 * LAYERS + 1, ROTATION: 2 * LAYERS, GATE: LAYERS},
    "qwen3": {NORM: 4 * LAYERS + 1, ROTATION: 2 * LAYERS, GATE: LAYERS},
    "mistral": {NORM: 2 * LAYERS + 1, ROTATION: 2 * LAYERS, GATE: LAYERS},
    "gemma2": {NORM: 4 * LAYERS + 1, ROTATION: 2 * LAYERS},
    "gpt2": {},
}


def bind(step: Instruction, dtype: torch.dtype) -> object:
    if step.target in CHAINS:
        return CHAINS[step.target](dtype)
    return bind_product(step.target, dtype, native=True) or (lambda *a: scaled_dot_product(*a[:-1], 0.0))


@pytest.mark.skipif(kernels() is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_fused_and_packed_program_computes_the_same(
    family: str, dtype: torch.dtype, model: Callable[[str], Model]
) -> None:
    directory = str(model(family).directory)
    captured = capture_ref(directory, batch=1, tokens=8, dtype=dtype)
    program, state = whole(captured, directory, dtype)
    torch.manual_seed(0)  # for some inputs two experts are all but equal, and rounding chooses between them
    ids, positions = torch.randint(0, 320, (1, 13)), torch.arange(13)[None]
    folded, constants = fold_constants(program, state)
    fused = fuse(folded, constants, dtype)
    expected_chains = dict(EXPECTED.get(family, {}))
    if family == "gemma2" and dtype == torch.bfloat16:
        del expected_chains[NORM]  # its weights are applied in float32
    counts = {c: sum(i.target == c for i in fused.instructions) for c in (NORM, ROTATION, GATE)}
    if family in FAMILIES:
        assert {c: n for c, n in counts.items() if n} == expected_chains
    once = compute_once(fused)
    rotations = [s.args[1:] for s in once.instructions if s.target == ROTATION]
    assert len(set(map(str, rotations))) <= 1
    packed, weights = pack(once, dict(constants), dtype, torch.device("cpu"))
    assert bool(grouped_products(fused, constants)) == (family == "mixtral")
    if packs(dtype):
        assert not products(packed, weights)
        assert not grouped_products(packed, weights)
        assert sum(t.nbytes for t in weights.values()) < 1.5 * sum(t.nbytes for t in constants.values())  # not both
    with torch.inference_mode():
        (expected,) = StageModule(program, state, attention=lambda s: bind(s, dtype))(ids, positions)
        (got,) = StageModule(packed, weights, attention=lambda s: bind(s, dtype))(ids, positions)
    scale = float(expected.abs().max())
    assert float((got.float() - expected.float()).abs().max()) < scale * (2e-5 if dtype == torch.float32 else 0.1)
    assert len(packed.instructions) < 0.8 * len(program.instructions) or family not in FAMILIES or family == "gpt2"


@pytest.mark.skipif(kernels() is None, reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_taken_as_torch_takes_them(dtype: torch.dtype) -> None:
    take = CHAINS[TAKE](torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    x, index = torch.randn(3, 7, 5, dtype=dtype), torch.tensor([[6, 0, 3], [3, 3, 1]])
    assert torch.equal(take(x[0], 0, index), x[0][index])
    assert torch.equal(take(x[:1], 1, index[0]), x[:1, index[0]])
    assert torch.equal(take(x, 1, index[1]), x[:, index[1]])  # rows of several parts aren't next to each other
    assert torch.equal(take(x[0].t(), 0, index[1, 2:]), x[0].t()[[1]])


def test_what_has_another_use_is_left_alone(model: Callable[[str], Model]) -> None:
    config = ServeConfig(model=str(model("llama").directory))
    captured = capture_ref(config.model, batch=1, tokens=8)
    _, state = whole(captured, config.model, torch.float32)
    order = list(captured.node_id)
    cut = order.index("rsqrt")  # the first norm straddles two stages
    first, second = split(captured, {i: int(i > cut) for i in captured.node_id.values()})
    assert not [i for i in fuse(first, state, torch.float32).instructions if i.target == NORM]
    fused = [i for i in fuse(second, state, torch.float32).instructions if i.target == NORM]
    assert len(fused) == 2 * LAYERS
