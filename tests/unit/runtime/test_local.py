"""A split model's output, loss and every gradient equal the whole model's."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nesa_ray.errors import CheckpointError
from nesa_ray.graph.capture import Captured, capture
from nesa_ray.graph.models import capture_ref
from nesa_ray.graph.split import StageModule
from nesa_ray.planning.schedule import SCHEDULES
from nesa_ray.runtime.link_codec import Encoder, LinkCodec
from nesa_ray.runtime.local import LocalPipeline
from nesa_ray.runtime.weight_gradient import WeightGradients
from tests.unit.models import TwoTower, UNet, even_plan, random_plan, relative_error

VOCABULARY = 97


def llama(*, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def decoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Captured]:
    config = llama(tied=request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    directory = tmp_path_factory.mktemp("llama")
    config.save_pretrained(directory)
    return model, capture_ref(directory, batch=2, tokens=8)


def lm_batch(batch: int, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, tokens + 1), generator=g)
    positions = torch.arange(tokens).expand(batch, tokens)
    return {"input_ids": ids[:, :-1], "position_ids": positions, "labels": ids[:, 1:]}


def lm_loss(results: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    (logits,) = results.values()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets["labels"].flatten())


@pytest.mark.parametrize("shape", [(1, 1), (1, 13), (3, 7)])
def test_output_equals_the_whole_models_at_other_shapes(decoder, shape):
    model, captured = decoder
    local = LocalPipeline(captured, random_plan(captured, 3, seed=1), model.state_dict())
    batch = lm_batch(*shape, seed=3)
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    assert torch.equal(local(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("seed", range(3))
def test_step_gradients_equal_the_whole_models(decoder, schedule, seed):
    model, captured = decoder
    plan = random_plan(captured, 4, seed) if seed else even_plan(captured, 4)
    local = LocalPipeline(captured, plan, copy.deepcopy(model.state_dict()))
    batches = [lm_batch(2, 8, seed=m) for m in range(5)]
    recompute = [0, 2] if seed == 1 else []
    losses = local.step(batches, lm_loss, targets=["labels"], schedule=schedule, recompute=recompute)
    assert_equal_steps(model, batches, local, losses)


def test_step_through_codecs(decoder):
    """Every link in int8, and switched off: near the whole model's gradients, and equal to them."""
    model, captured = decoder
    local = LocalPipeline(captured, even_plan(captured, 3), copy.deepcopy(model.state_dict()))
    batches = [lm_batch(2, 8, seed=m) for m in range(3)]
    of_links = {f"rank{r}": LinkCodec(activations="int8", gradients="int8") for r in range(3)}
    encoders = {r: Encoder(of_links) for r in range(3)}
    losses = local.step(batches, lm_loss, targets=["labels"], encoders=encoders)
    with torch.no_grad():
        expected = [float(lm_loss({"": model(**inputs(b)).logits}, b)) for b in batches]
    assert [float(x.detach()) for x in losses] == pytest.approx(expected, rel=1e-3)
    errors = [relative_error(local.get_parameter(n).grad, g) for n, g in whole_gradients(model, batches).items()]
    assert 1e-4 < max(errors) < 0.05
    for encoder in encoders.values():
        encoder.on = False
    local.zero_grad()
    assert_equal_steps(model, batches, local, local.step(batches, lm_loss, targets=["labels"], encoders=encoders))


def inputs(batch):
    return {k: batch[k] for k in ("input_ids", "position_ids")}


def whole_gradients(model, batches):
    model.zero_grad()
    for b in batches:
        (lm_loss({"": model(**inputs(b)).logits}, b) / len(batches)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_equal_steps(model, batches, local, losses):
    """The losses and gradients of a step are the whole model's."""
    model.zero_grad()
    for m, b in enumerate(batches):
        out = model(input_ids=b["input_ids"], position_ids=b["position_ids"])
        loss = lm_loss({"logits": out.logits}, b)
        assert relative_error(losses[m], loss) < 1e-6
        (loss / len(batches)).backward()
    whole = dict(model.named_parameters())
    assert dict(local.named_parameters()).keys() == whole.keys()
    for name, p in local.named_parameters():
        assert relative_error(p.grad, whole[name].grad) < 1e-5, name


@pytest.mark.parametrize("recompute", [[], [1, 2]])
def test_interleaved_gradients_equal_the_whole_models(decoder, recompute):
    """Two ranks of two stages: what they send themselves, and the tied weight, are one tensor."""
    model, captured = decoder
    local = LocalPipeline(captured, even_plan(captured, 4), copy.deepcopy(model.state_dict()))
    batches = [lm_batch(2, 8, seed=m) for m in range(5)]
    losses = local.step(
        batches, lm_loss, targets=["labels"], schedule="interleaved", recompute=recompute,
        rank_of={0: 0, 1: 1, 2: 0, 3: 1},
    )  # fmt: skip
    assert_equal_steps(model, batches, local, losses)


@pytest.mark.parametrize("rank_of", [{0: 0, 1: 0, 2: 1}, {0: 0, 1: 0, 2: 0}])
def test_neighbouring_stages_on_one_rank(decoder, rank_of):
    model, captured = decoder
    local = LocalPipeline(captured, even_plan(captured, 3), copy.deepcopy(model.state_dict()))
    batches = [lm_batch(2, 8, seed=m) for m in range(3)]
    losses = local.step(batches, lm_loss, targets=["labels"], schedule="interleaved", rank_of=rank_of)
    assert_equal_steps(model, batches, local, losses)


def test_state_dict_has_the_modules_names_and_values(decoder):
    model, captured = decoder
    local = LocalPipeline(captured, even_plan(captured, 3), model.state_dict())
    mine = local.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(mine[name], value)


def test_weights_on_the_meta_device_are_refused(decoder):
    _, captured = decoder
    with pytest.raises(CheckpointError, match=r"tensors have no values, the first is model\.embed_tokens"):
        LocalPipeline(captured, even_plan(captured, 2))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_skips_over_many_stages(k, seed):
    torch.manual_seed(0)
    model = UNet()
    x = torch.randn(2, 3, 16, 16)
    captured = capture(model, (x,))
    local = LocalPipeline(captured, random_plan(captured, k, seed))
    whole = copy.deepcopy(model)
    expected = whole(x)
    assert torch.equal(local(x), expected)
    expected.square().mean().backward()
    local(x).square().mean().backward()
    for name, p in whole.named_parameters():
        assert relative_error(local.get_parameter(name).grad, p.grad) < 1e-5, name


def test_branches_and_several_outputs():
    torch.manual_seed(0)
    model = TwoTower()
    batch = {"user": torch.randn(4, 6), "item": torch.randn(4, 5), "clicked": torch.rand(4)}
    captured = capture(model, (), {"user": batch["user"], "item": batch["item"]})
    plan = random_plan(captured, 3, seed=5)
    local = LocalPipeline(captured, plan)
    score_name, user_name = captured.outputs

    def loss(results, targets):
        score = results[score_name]
        return torch.nn.functional.mse_loss(score, targets["clicked"]) + results[user_name].square().mean()

    local.step([batch], loss, targets=["clicked"])
    out = model(batch["user"], batch["item"])
    (torch.nn.functional.mse_loss(out["score"], batch["clicked"]) + out["user"].square().mean()).backward()
    for name, p in model.named_parameters():
        assert relative_error(local.get_parameter(name).grad, p.grad) < 1e-5, name
    assert torch.equal(local(user=batch["user"], item=batch["item"])["score"], out["score"])


def test_a_split_backward_defers_the_weights(decoder):
    """The zero-bubble schedule's `I` leaves no gradient in a linear's weight; its `W` does."""
    model, captured = decoder
    local = LocalPipeline(captured, even_plan(captured, 2), copy.deepcopy(model.state_dict()))
    store = WeightGradients()
    weights = dict(local.named_parameters())
    store.deferring = True
    x, w = torch.randn(3, 32), weights["model.layers.0.self_attn.q_proj.weight"]
    store.linear(x, w).sum().backward()
    assert w.grad is None
    pending = store.take()
    assert len(pending) == 1
    pending[0]()
    assert relative_error(w.grad, torch.ones(3, 32).t() @ x) < 1e-6
    operators = {i.target for p in local.programs for i in p.instructions}
    assert operators >= {"aten.linear.default", "aten.embedding.default"}
    module = StageModule(local.programs[0], local.state_dict(), operators=store.operators)
    assert store.linear in module._run.__globals__.values()
