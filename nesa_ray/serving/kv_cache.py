"""Attention over a paged key-value cache local to a stage: what each nesa::attention node is bound to when serving.

Shapes: T tokens of the step, N sequences, H query heads, G key-value heads, D and E widths of a key's and a value's
head, S cached positions, P = blocks · block size places of the cache.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from nesa_ray.errors import CaptureError
from nesa_ray.graph.attention import scaled_dot_product
from nesa_ray.serving.step import Step


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of one attention node: query heads, key-value heads, widths of a key's and a value's head."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that the cache holds for a token at this node."""
        return self.kv_heads * (self.key_width + self.value_width) * dtype.itemsize


class StepContext:
    """The step that the stage is computing: set before each run, read by every attention node of the stage.

    Sequences with at most `few_tokens` tokens in the step are attended to together, the others one by one.
    """

    def __init__(self, block_size: int, few_tokens: int = 1, device: torch.device | str = "cpu") -> None:
        self.block_size, self.few_tokens, self._device = block_size, few_tokens, torch.device(device)
        self._within = torch.arange(block_size, device=device)

    def set(self, step: Step) -> None:
        """Prepares what all nodes need."""
        self.step = step
        starts = step.starts_N1.tolist()
        self._lengths = step.lengths_N.tolist()
        counts = [b - a for a, b in itertools.pairwise(starts)]
        self.few = [n for n, c in enumerate(counts) if c <= self.few_tokens]
        self.few_rows = torch.tensor(self.few, dtype=torch.int64)
        many = [n for n, c in enumerate(counts) if c > self.few_tokens]
        self.many = [(starts[n], starts[n + 1], self._places_of(step.tables_NM[n], self._lengths[n])) for n in many]
        self.places_T = step.places_T.to(self._device)
        if self.few and self.few_tokens == 1:
            most = max(self._lengths[n] for n in self.few)
            self.single_rows = step.starts_N1[self.few_rows].to(self._device)
            self.single_lengths = step.lengths_N[self.few_rows].to(self._device)
            self.single_places = self._places_of(step.tables_NM[self.few_rows], most)  # [N, S]

    def _places_of(self, table: torch.Tensor, length: int) -> torch.Tensor:
        """Places of the cache of the first `length` positions; of several tables, [N, length]."""
        blocks = table[..., : -(-length // self.block_size)].to(self._device)
        return (blocks[..., None] * self.block_size + self._within).flatten(-2)[..., :length]


class PagedAttention:
    """One attention node with its cache.  Has nesa::attention's signature; q, k, v are those of the step: [1, ·, T, ·].

    Writes the step's keys and values to their places, then lets each token see its own sequence up to itself.
    """

    def __init__(
        self, name: str, shape: HeadShape, places: int, context: StepContext, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.shape, self.context = name, shape, context
        self.k_PGD = torch.zeros(places, shape.kv_heads, shape.key_width, dtype=dtype, device=device)
        self.v_PGE = torch.zeros(places, shape.kv_heads, shape.value_width, dtype=dtype, device=device)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        causal: bool,
        window: int,
        softcap: float,
        dropout: float,
    ) -> torch.Tensor:
        """[1, H, T, E]"""
        if bias is not None or not causal:
            raise CaptureError(f"{self.name}: attention with a bias, or not causal, can't be served from a cache")
        return self._compute(q, k, v, scale, window, softcap).transpose(0, 1)[None]

    def _compute(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """[T, H, E]"""
        self.k_PGD.index_copy_(0, self.context.places_T, k[0].transpose(0, 1))
        self.v_PGE.index_copy_(0, self.context.places_T, v[0].transpose(0, 1))
        out_THE = q.new_empty(q.shape[2], q.shape[1], self.shape.value_width)
        if self.context.few:
            out_THE[self.context.single_rows] = self._attend_single(q, scale, window, softcap)
        self._attend_many(out_THE, q, scale, window, softcap)
        return out_THE

    def _attend_many(self, out_THE: torch.Tensor, q: torch.Tensor, scale: float, window: int, softcap: float) -> None:
        """Several tokens of a sequence at once, sequence by sequence, into their rows of `out_THE`."""
        for start, end, places in self.context.many:
            keys = self.k_PGD[places].transpose(0, 1)[None]
            values = self.v_PGE[places].transpose(0, 1)[None]
            mixed = scaled_dot_product(q[:, :, start:end], keys, values, None, scale, True, window, softcap, 0.0)
            out_THE[start:end] = mixed[0].transpose(0, 1)

    def _attend_single(self, q: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
        """The one token of several sequences, each over its own cache: [N, H, E]."""
        context, groups = self.context, self.shape.kv_heads
        q_NGRD = q[0, :, context.single_rows].transpose(0, 1).unflatten(1, (groups, -1))
        k_NSGD = self.k_PGD[context.single_places]
        v_NSGE = self.v_PGE[context.single_places]
        scores = q_NGRD @ k_NSGD.permute(0, 2, 3, 1) * scale  # [N, G, R, S]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(k_NSGD.shape[1], device=q.device)
        ends = context.single_lengths[:, None]
        hidden = at >= ends if not window else (at >= ends) | (at < ends - window)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(v_NSGE.dtype)
        return (weights @ v_NSGE.transpose(1, 2)).flatten(1, 2)
