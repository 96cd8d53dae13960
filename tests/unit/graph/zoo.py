"""The models that test_any_model captures, cuts and trains: each small, each with something of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from nesa_ray.graph.capture import Captured, capture
from nesa_ray.graph.models import capture_ref, initial_model
from tests.unit.models import TwoTower, UNet

VOCABULARY, BATCH, TOKENS = 61, 2, 9
Tensors = dict[str, torch.Tensor]
# (the module's output tensors in order, targets) -> scalar
Loss = Callable[[Sequence[torch.Tensor], Tensors], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One model: `build` gives the module with its weights and what was captured of it."""

    name: str
    shows: str
    build: Callable[[], tuple[nn.Module, Captured]]
    batch: Callable[[int], tuple[Tensors, Tensors]]
    loss: Loss
    constants: dict[str, Any] = field(default_factory=dict)
    stages: int = 4
    decoder: bool = False


def _hugging_face(config: Any, *, seed: int = 0) -> Callable[[], tuple[nn.Module, Captured]]:
    def build() -> tuple[nn.Module, Captured]:
        with tempfile.TemporaryDirectory() as directory:
            config.save_pretrained(directory)
            return initial_model(config, seed), capture_ref(directory, batch=BATCH, tokens=TOKENS)

    return build


def _plain(make: Callable[[], nn.Module], batch: Callable[[int], tuple[Tensors, Tensors]]) -> Any:
    def build() -> tuple[nn.Module, Captured]:
        torch.manual_seed(0)
        module = make()
        with torch.device("meta"):
            empty = make()
        captured = capture(empty, (), {k: v.to("meta") for k, v in batch(0)[0].items()})
        return module, captured

    return build


def _generator(m: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + m)


def token_batch(m: int, shape: tuple[int, int] = (BATCH, TOKENS), *, positions: bool = True) -> tuple[Tensors, Tensors]:
    """Token ids (and positions) with the next tokens as labels."""
    ids = torch.randint(0, VOCABULARY, (shape[0], shape[1] + 1), generator=_generator(m))
    inputs = {"input_ids": ids[:, :-1]}
    if positions:
        inputs["position_ids"] = torch.arange(shape[1]).expand(shape)
    return inputs, {"labels": ids[:, 1:]}


def token_loss(outputs: Sequence[torch.Tensor], targets: Tensors) -> torch.Tensor:
    """Cross entropy of the first output."""
    return F.cross_entropy(outputs[0].flatten(0, 1), targets["labels"].flatten())


def _image_batch(m: int) -> tuple[Tensors, Tensors]:
    g = _generator(m)
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=g)}, {"labels": torch.randint(0, 5, (3,), generator=g)}


def _label_loss(outputs: Sequence[torch.Tensor], targets: Tensors) -> torch.Tensor:
    return F.cross_entropy(outputs[0], targets["labels"])


def _square_loss(outputs: Sequence[torch.Tensor], targets: Tensors) -> torch.Tensor:
    return sum((o.square().mean() for o in outputs), torch.zeros(()))


def _decoder(name: str, shows: str, config: Any, *, positions: bool = True, operator: bool = True) -> Case:
    return Case(
        name, shows, _hugging_face(config), lambda m: token_batch(m, positions=positions), token_loss,
        {"use_cache": False}, decoder=operator,
    )  # fmt: skip


_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T = transformers

DECODERS = (
    _decoder("Llama", "RoPE, grouped-query attention", T.LlamaConfig(**_LLAMA)),
    _decoder("Llama, tied", "input and output embeddings are one weight", T.LlamaConfig(
        **_LLAMA, tie_word_embeddings=True)),
    _decoder("Qwen3", "normalised queries and keys", T.Qwen3Config(**_LLAMA, head_dim=8)),
    _decoder("Mistral", "sliding window of 4, shorter than the sequence", T.MistralConfig(**_LLAMA, sliding_window=4)),
    _decoder("Gemma 2", "softcap, window on alternate layers, tied", T.Gemma2Config(
        **_LLAMA, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0)),
    _decoder("Gemma 3", "local and global rotary bases", T.Gemma3TextConfig(
        **_LLAMA, head_dim=8, sliding_window=4, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"])),
    _decoder("GPT-2", "learned positions, tied", T.GPT2Config(**_GPT2, **_NO_DROPOUT)),
    _decoder("OPT", "learned positions with an offset, ReLU", T.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, dropout=0.0,
        max_position_embeddings=32, word_embed_proj_dim=16, pad_token_id=1, bos_token_id=1, eos_token_id=2)),
    _decoder("GPT-NeoX", "parallel attention and MLP, partial RoPE", T.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        bos_token_id=1, eos_token_id=2)),
    _decoder("Phi-3", "fused projections", T.Phi3Config(**_LLAMA)),
    _decoder("OLMo 2", "normalisation after the sublayer", T.Olmo2Config(**_LLAMA)),
    _decoder("Mixtral", "mixture of experts, weights renormalised in place", T.MixtralConfig(
        **_LLAMA, num_local_experts=4)),
    _decoder("Qwen2-MoE", "mixture of experts with a shared one", T.Qwen2MoeConfig(
        **_LLAMA, **_EXPERTS, shared_expert_intermediate_size=24)),
    _decoder("Qwen3-MoE", "mixture of experts", T.Qwen3MoeConfig(**_LLAMA, **_EXPERTS, head_dim=8)),
    _decoder("DeepSeek-V3", "latent attention, grouped routing", T.DeepseekV3Config(
        **{**_LLAMA, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1)),
    _decoder("BLOOM", "ALiBi", T.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2), positions=False,
        operator=False),
    _decoder("MPT", "ALiBi", T.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCABULARY, max_seq_len=32),
             positions=False, operator=False),
    _decoder("GPT-J", "attention of its own, interleaved RoPE", T.GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, rotary_dim=4, n_positions=32, bos_token_id=1,
        eos_token_id=2, **_NO_DROPOUT), operator=False),
)  # fmt: skip


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a skip (He et al., arXiv 1512.03385)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or width != out:
            self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A small torchvision-like ResNet: in-place ReLU and addition."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.layers = nn.Sequential(
            BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.layers(self.stem(pixel_values)), 1)
        return self.head(torch.flatten(x, 1))


class SharedLayers(nn.Module):
    """One block applied three times (ALBERT), and its weight once more as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.out = nn.Linear(12, 12, bias=False)
        self.out.weight = self.block[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return self.out(x)


class MultiTask(nn.Module):
    """A trunk with three heads at different depths; outputs in a dictionary, each with its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.classes, self.value, self.early = nn.Linear(16, 5), nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        a = F.gelu(self.a(x))
        b = F.silu(self.b(a))
        c = torch.sigmoid(self.c(b)) * a
        return {"classes": self.classes(c), "aux": (self.early(a), self.value(b).squeeze(-1))}


class MovingAverage(nn.Module):
    """Writes its own buffers, through a slice too, and reads them; writes activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
                self.seen[1:] += x.shape[0]
        z = y * self.mean
        z[:, 0] = z[:, 0] * 2
        z[:, 1:3].add_(1)
        z.t()[2].masked_fill_(x[:, 0] > 0, 0.5)
        return self.outer(z)


class Recurrent(nn.Module):
    """An embedding, an LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.lstm = nn.LSTM(12, 10, num_layers=2, batch_first=True)
        self.head = nn.Linear(10, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(input_ids))[0])


def _two_tower_batch(m: int) -> tuple[Tensors, Tensors]:
    g = _generator(m)
    inputs = {"user": torch.randn(4, 6, generator=g), "item": torch.randn(4, 5, generator=g)}
    return inputs, {"clicked": torch.rand(4, generator=g)}


def _two_tower_loss(outputs: Sequence[torch.Tensor], targets: Tensors) -> torch.Tensor:
    score, user = outputs
    return F.mse_loss(score, targets["clicked"]) + user.square().mean()


def _vectors(width: int) -> Callable[[int], tuple[Tensors, Tensors]]:
    return lambda m: ({"x": torch.randn(4, width, generator=_generator(m))}, {})


def _tasks_batch(m: int) -> tuple[Tensors, Tensors]:
    g = _generator(m)
    return {"x": torch.randn(4, 8, generator=g)}, {
        "labels": torch.randint(0, 5, (4,), generator=g), "value": torch.randn(4, generator=g),
    }  # fmt: skip


def _tasks_loss(outputs: Sequence[torch.Tensor], targets: Tensors) -> torch.Tensor:
    classes, early, value = outputs
    return F.cross_entropy(classes, targets["labels"]) + F.mse_loss(value, targets["value"]) + early.abs().mean()


def _pair_batch(m: int) -> tuple[Tensors, Tensors]:
    inputs, targets = token_batch(m, positions=False)
    return {**inputs, "decoder_input_ids": inputs["input_ids"].flip(0)}, targets


def _pictures(m: int) -> tuple[Tensors, Tensors]:
    return {"x": torch.randn(2, 3, 16, 16, generator=_generator(m))}, {}


_VIT = T.ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
    num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    architectures=["ViTForImageClassification"],
)  # fmt: skip
_RESNET = T.ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5, image_size=16,
    architectures=["ResNetForImageClassification"],
)  # fmt: skip
_BERT = T.BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCABULARY,
    max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    architectures=["BertForMaskedLM"],
)  # fmt: skip
_T5 = T.T5Config(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0, pad_token_id=0,
    decoder_start_token_id=0,
)  # fmt: skip

OTHERS = (
    Case("T5", "encoder and decoder, relative positions, one embedding for three", _hugging_face(_T5), _pair_batch,
         token_loss, {"use_cache": False}),
    Case("BERT", "encoder, masked LM head tied to the embedding", _hugging_face(_BERT),
         lambda m: token_batch(m, positions=False), token_loss),
    Case("ViT", "patches, class token", _hugging_face(_VIT), lambda m: _images(m, 2), _label_loss),
    Case("ResNet (transformers)", "batch normalisation in training mode", _hugging_face(_RESNET),
         lambda m: _images(m, 2), _label_loss),
    Case("ResNet", "batch normalisation, in-place ReLU and addition", _plain(ResNet, _image_batch), _image_batch,
         _label_loss),
    Case("U-Net", "skips over many stages, in-place ReLU", _plain(UNet, _pictures), _pictures, _square_loss),
    Case("two towers", "branches on different stages, two outputs", _plain(TwoTower, _two_tower_batch),
         _two_tower_batch, _two_tower_loss, stages=3),
    Case("multi-task", "three outputs, three losses", _plain(MultiTask, _tasks_batch), _tasks_batch, _tasks_loss),
    Case("shared layers", "one block three times, and its weight as the head", _plain(SharedLayers, _vectors(12)),
         _vectors(12), _square_loss),
    Case("moving average", "buffers and activations written in place, through views",
         _plain(MovingAverage, _vectors(6)), _vectors(6), _square_loss, stages=3),
    Case("LSTM", "recurrent layers", _plain(Recurrent, lambda m: token_batch(m, positions=False)),
         lambda m: token_batch(m, positions=False), token_loss, stages=3),
)  # fmt: skip


def _images(m: int, batch: int) -> tuple[Tensors, Tensors]:
    inputs, targets = _image_batch(m)
    return {k: v[:batch] for k, v in inputs.items()}, {k: v[:batch] for k, v in targets.items()}


CASES = (*DECODERS, *OTHERS)


def dropout_model() -> tuple[nn.Module, Captured]:
    """GPT-2 with dropout everywhere: embeddings, residuals, attention weights."""
    return _hugging_face(T.GPT2Config(**_GPT2, resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.3))()
