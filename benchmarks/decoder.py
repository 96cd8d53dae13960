"""The decoder of the training benchmarks: plain torch, so that every framework gets the same modules."""

from __future__ import annotations

import functools

import torch

WIDTH, LAYERS, HEADS, VOCABULARY, TOKENS, MICRO_BATCH, MICRO_BATCHES = 256, 8, 4, 4096, 128, 4, 8


class Block(torch.nn.Module):
    """Pre-norm attention and MLP.  Hidden states [B, T, D] in and out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Embed(torch.nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D], with learned positions."""

    def __init__(self, vocabulary: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(tokens, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids) + self.positions.weight[: ids.shape[1]]


class Head(torch.nn.Module):
    """Hidden states -> logits [B, T, V]."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.norm, self.out = torch.nn.LayerNorm(width), torch.nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def decoder(layers: int = LAYERS) -> torch.nn.Sequential:
    """The whole model; the same weights whenever it is called."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block(WIDTH, HEADS) for _ in range(layers)]
        return torch.nn.Sequential(Embed(VOCABULARY, WIDTH, TOKENS), *blocks, Head(VOCABULARY, WIDTH))


def example() -> tuple[torch.nn.Module, tuple[torch.Tensor], dict]:
    """For `nesa-ray plan --model benchmarks.decoder:example`."""
    return decoder(), (torch.zeros(MICRO_BATCH, TOKENS, dtype=torch.long),), {}


def smaller_example() -> tuple[torch.nn.Module, tuple[torch.Tensor], dict]:
    """The same with micro-batches of half the size."""
    return decoder(), (torch.zeros(MICRO_BATCH // 2, TOKENS, dtype=torch.long),), {}


@functools.cache
def token_stream() -> torch.Tensor:
    """The tokens that all arms train on, int64; window w of it is tokens [w · TOKENS, (w + 1) · TOKENS], both ends."""
    return torch.randint(0, VOCABULARY, (1 << 18,), generator=torch.Generator().manual_seed(0))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of one step, [MICRO_BATCHES · MICRO_BATCH, TOKENS] each: the next windows in a round."""
    stream, size = token_stream(), MICRO_BATCHES * MICRO_BATCH
    windows = torch.arange(step * size, (step + 1) * size) % ((len(stream) - 1) // TOKENS)
    places = windows[:, None] * TOKENS + torch.arange(TOKENS)
    return stream[places], stream[places + 1]


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
