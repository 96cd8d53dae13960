"""The costs that the planner reads: flops, parameter bytes, bytes kept for the backward, against torch's own count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen3MoeConfig, T5Config

from nesa_ray.graph import cost
from nesa_ray.graph.capture import Captured, capture
from nesa_ray.graph.models import capture_ref
from nesa_ray.graph.split import StageModule, split
from tests.unit.graph.zoo import CASES, dropout_model, token_batch
from tests.unit.models import even_plan

BY_NAME = {c.name: c for c in CASES}
ATTENTION = "nesa.attention.default"


def kept_by_autograd(module: torch.nn.Module, captured: Captured, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct memory that one stage's forward saves, without parameters and inputs."""
    (program,) = split(captured, even_plan(captured, 1).stage_of)
    given = {**captured.state, **dict(module.named_buffers()), **dict(module.named_parameters())}
    stage = StageModule(program, {n: given[n].detach().clone() for n in program.state})
    weights = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    known = {t.untyped_storage().data_ptr() for t in (*weights.values(), *inputs.values())}
    alive: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        alive.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        stage.run(weights, *[inputs[n] for n in program.inputs], seed=1)
        return sum(t.untyped_storage().nbytes() for at, t in alive.items() if at not in known)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Qwen3-MoE", "MPT", "T5", "ViT", "ResNet", "U-Net"])
def test_bytes_kept_for_the_backward(name):
    case = BY_NAME[name]
    module, captured = case.build()
    kept = kept_by_autograd(module, captured, case.batch(0)[0])
    assert sum(n.saved_bytes for n in captured.graph.nodes) == pytest.approx(kept, rel=0.1)


def test_bytes_kept_with_dropout():
    module, captured = dropout_model()
    kept = kept_by_autograd(module, captured, token_batch(0)[0])
    assert sum(n.saved_bytes for n in captured.graph.nodes) == pytest.approx(kept, rel=0.1)


def test_nothing_is_kept_for_frozen_layers():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)).requires_grad_(False)
    captured = capture(layers, (torch.randn(2, 8),))
    assert sum(n.saved_bytes for n in captured.graph.nodes) == 0


@pytest.mark.parametrize("name", ["MPT", "GPT-J", "ResNet", "U-Net", "multi-task"])
def test_flops_equal_torchs_counter(name):
    case = BY_NAME[name]
    module, captured = case.build()
    with FlopCounterMode(display=False) as counter:
        module(**case.batch(0)[0], **case.constants)
    counted = {str(op) for op in cost.FLOPS}
    mine = sum(n.flops for n in captured.graph.nodes if n.op.rpartition(".")[0] in counted)
    assert mine == pytest.approx(counter.get_total_flops(), rel=1e-9)


def _write(config, directory: Path) -> Path:
    config.save_pretrained(directory)
    return directory


def test_a_large_decoder_on_the_meta_device(tmp_path):
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=32000)  # fmt: skip
    captured = capture_ref(_write(config, tmp_path), batch=2, tokens=256, dtype=torch.bfloat16)
    width, heads = config.hidden_size, config.num_attention_heads
    layer = 2 * width * width + 2 * width * width // 4 + 3 * width * config.intermediate_size
    matrices = 2 * layer + width * config.vocab_size
    parameters = matrices + width * config.vocab_size + 5 * width
    assert sum(n.param_bytes for n in captured.graph.nodes) == 2 * parameters
    linear = sum(n.flops for n in captured.graph.nodes if n.op == "aten.linear.default")
    assert linear == 2 * matrices * 2 * 256  # 2 N D
    attention = [n for n in captured.graph.nodes if n.op == ATTENTION]
    assert [n.flops for n in attention] == [2 * heads * 256 * 256 * 128 * 2] * 2  # 4 B H T T D, halved by the mask


def test_experts_cost_what_their_tokens_cost(tmp_path):
    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
                            vocab_size=1000)  # fmt: skip
    captured = capture_ref(_write(config, tmp_path), batch=2, tokens=64, dtype=torch.bfloat16)
    experts = [n for n in captured.graph.nodes if "grouped_mm" in n.op]
    assert len(experts) == 4
    assert sum(n.flops for n in experts) == 2 * (2 * 64 * 4) * (3 * 256 * 128) * 2
    parameters = sum(t.numel() for n, t in captured.state.items() if n in captured.trainable)
    assert sum(n.param_bytes for n in captured.graph.nodes) == 2 * parameters


def test_an_encoder_decoders_parameters_count_once(tmp_path):
    config = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=500, dropout_rate=0.0)
    captured = capture_ref(_write(config, tmp_path), batch=2, tokens=16)
    parameters = sum(t.numel() for n, t in captured.state.items() if n in captured.trainable)
    assert sum(n.param_bytes for n in captured.graph.nodes) == 4 * parameters
