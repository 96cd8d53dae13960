"""Dropout and batch statistics don't depend on the cut; evaluation switches them off."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nesa_ray.graph.capture import Captured, capture
from nesa_ray.graph.modes import derive_seed
from nesa_ray.graph.split import StageModule, split
from nesa_ray.runtime.local import LocalPipeline
from tests.unit.graph.zoo import ResNet, dropout_model, token_batch
from tests.unit.models import even_plan, random_plan, relative_error


class Replay(TorchFunctionMode):
    """Gives the whole module the masks of the captured operators, found by their order in the program."""

    def __init__(self, captured: Captured, seed: int) -> None:
        super().__init__()
        random = (torch.ops.aten.dropout.default, torch.ops.nesa.attention.default)
        self.names = itertools.cycle([n.name for n in captured.program.nodes if n.target in random])
        self.seed = seed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.dropout:
            x, p = args[0], kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, next(self.names)))
            return x * (torch.empty_like(x).bernoulli_(1 - p, generator=generator) / (1 - p))
        if func is F.scaled_dot_product_attention:
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(self.seed, next(self.names)))
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def gpt2() -> tuple[torch.nn.Module, Captured]:
    return dropout_model()


def lm_loss(results, targets):
    (logits,) = results.values()
    return F.cross_entropy(logits.flatten(0, 1), targets["labels"].flatten())


def trained(module, captured, stages, *, seed, plan_seed=0) -> tuple[list[torch.Tensor], LocalPipeline]:
    local = LocalPipeline(captured, random_plan(captured, stages, plan_seed), copy.deepcopy(module.state_dict()))
    batches = [{**i, **t} for i, t in map(token_batch, range(3))]
    return local.step(batches, lm_loss, targets=["labels"], seed=seed), local


def test_dropout_equals_the_whole_models_with_the_same_masks(gpt2):
    module, captured = gpt2
    losses, local = trained(module, captured, 4, seed=11)
    whole = copy.deepcopy(module)
    for m, (inputs, targets) in enumerate(map(token_batch, range(3))):
        with Replay(captured, derive_seed(11, m)):
            loss = lm_loss({"logits": whole(**inputs, use_cache=False).logits}, targets)
        assert relative_error(losses[m], loss.detach()) <= 1e-5
        (loss / 3).backward()
    for name, p in whole.named_parameters():
        assert relative_error(local.get_parameter(name).grad, p.grad) <= 1e-5, name


def test_dropout_is_the_same_however_the_model_is_cut_and_another_for_another_seed(gpt2):
    losses, local = trained(*gpt2, 1, seed=5)
    for stages, plan_seed in ((2, 1), (5, 2)):
        others, other = trained(*gpt2, stages, seed=5, plan_seed=plan_seed)
        assert torch.equal(torch.stack(losses), torch.stack(others))
        for name, p in local.named_parameters():
            assert relative_error(other.get_parameter(name).grad, p.grad) <= 1e-5, name
    assert not torch.equal(torch.stack(losses), torch.stack(trained(*gpt2, 2, seed=6)[0]))


def test_micro_batches_draw_different_masks(gpt2):
    module, captured = gpt2
    local = LocalPipeline(captured, even_plan(captured, 2), module.state_dict())
    inputs, targets = token_batch(0)
    losses = local.step([{**inputs, **targets}] * 2, lm_loss, targets=["labels"])
    assert losses[0] != losses[1]


def test_evaluation_has_no_dropout(gpt2):
    module, captured = gpt2
    local = LocalPipeline(captured, even_plan(captured, 3), module.state_dict()).eval()
    inputs, _ = token_batch(0)
    whole = copy.deepcopy(module).eval()
    with torch.no_grad():
        assert torch.equal(local(**inputs, use_cache=False).logits, whole(**inputs, use_cache=False).logits)


def test_calls_in_training_mode_follow_torchs_seed(gpt2):
    module, captured = gpt2
    local = LocalPipeline(captured, even_plan(captured, 3), module.state_dict())
    inputs, _ = token_batch(0)

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return local(**inputs, use_cache=False).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


def test_a_stage_computed_again_gives_the_same_and_writes_nothing():
    torch.manual_seed(0)
    module = torch.nn.Sequential(ResNet(4), torch.nn.Dropout(0.5), torch.nn.Linear(5, 3))
    x = torch.randn(3, 3, 8, 8)
    captured = capture(module, (x,))
    (program,) = split(captured, even_plan(captured, 1).stage_of)
    stage = StageModule(program, {n: t.clone() for n, t in captured.state.items()})
    weights = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    (first,) = stage.run(weights, x, seed=3)
    before = {n: b.clone() for n, b in stage.named_buffers()}
    assert before["0.stem.1.num_batches_tracked"] == 1
    (second,) = stage.run(weights, x, seed=3, again=True)
    assert torch.equal(first, second)
    assert all(torch.equal(before[n], b) for n, b in stage.named_buffers())


def test_evaluation_reads_running_statistics():
    torch.manual_seed(0)
    module = ResNet(4)
    x = torch.randn(3, 3, 8, 8)
    captured = capture(module, (x,))
    local = LocalPipeline(captured, random_plan(captured, 3, 1), copy.deepcopy(module.state_dict()))
    module(x)
    local(x)
    with torch.no_grad():
        assert torch.equal(local.eval()(x), module.eval()(x))
    assert torch.equal(local.get_buffer("stem.1.num_batches_tracked"), torch.tensor(1))
