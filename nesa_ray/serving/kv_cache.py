"""Attention over a paged key-value cache local to a stage: what each nesa::attention node is bound to when serving.

A block holds keys as [G, D, block size], values as [G, block size, E]: what one head reads of a block lies together,
and sixteen keys are scored at once.

Shapes: T tokens of the step, N sequences, H query heads, G key-value heads, D and E widths of a key's and a value's
head, S cached positions, B blocks of P places, M blocks of a block table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from nesa_ray.errors import CaptureError
from nesa_ray.graph.attention import scaled_dot_product
from nesa_ray.serving.pages import zeros
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

    Sequences with few tokens in the step are attended to together, the others one by one.
    """

    def __init__(self, block_size: int, device: torch.device | str = "cpu") -> None:
        self.block_size, self._device = block_size, torch.device(device)

    def set(self, step: Step) -> None:
        """Prepares what all nodes need."""
        self._divide(step)
        places_T = step.places_T.to(self._device)
        self.written = (places_T // self.block_size, places_T % self.block_size)
        if self.few:
            most = max(self.lengths[n] for n in self.few)
            self.single_rows = step.starts_N1[self.few_rows].to(self._device)
            self.single_lengths = step.lengths_N[self.few_rows].to(self._device)
            self.single_tables = self._table(step.tables_NM[self.few_rows], most)

    def _divide(self, step: Step) -> None:
        """Into sequences with few tokens and those with many."""
        self.step = step
        self.sizes = len(step.tokens_T), len(step.rows_R)
        starts = step.starts_N1.tolist()
        self.lengths = lengths = step.lengths_N.tolist()
        counts = [b - a for a, b in itertools.pairwise(starts)]
        few = [self._few(c, length) for c, length in zip(counts, lengths, strict=True)]
        self.few = [n for n, together in enumerate(few) if together]
        self.few_rows = torch.tensor(self.few, dtype=torch.int64)
        many = [n for n, together in enumerate(few) if not together]
        self.many = [(starts[n], starts[n + 1], lengths[n], self._table(step.tables_NM[n], lengths[n])) for n in many]

    def _few(self, count: int, length: int) -> bool:
        """Whether a sequence is attended to together with others: its tokens in the step, and up to its last one."""
        return count == 1

    def _table(self, table: torch.Tensor, length: int) -> torch.Tensor:
        """The blocks of the first `length` positions."""
        return table[..., : -(-length // self.block_size)].to(self._device)


class PagedAttention:
    """One attention node with its cache.  Has nesa::attention's signature; q, k, v are those of the step: [1, ·, T, ·].

    Writes the step's keys and values to their places, then lets each token see its own sequence up to itself.
    """

    def __init__(
        self, name: str, shape: HeadShape, blocks: int, context: StepContext, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.shape, self.context = name, shape, context
        size, groups = context.block_size, shape.kv_heads
        self.k_BGDP = zeros((blocks, groups, shape.key_width, size), dtype, device)
        self.v_BGPE = zeros((blocks, groups, size, shape.value_width), dtype, device)

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
        block_T, within_T = self.context.written
        self.k_BGDP[block_T, :, :, within_T] = k[0].transpose(0, 1)
        self.v_BGPE[block_T, :, within_T] = v[0].transpose(0, 1)
        out_THE = q.new_empty(q.shape[2], q.shape[1], self.shape.value_width)
        if self.context.few:
            out_THE[self.context.single_rows] = self._attend_single(q, scale, window, softcap)
        self._attend_many(out_THE, q, scale, window, softcap)
        return out_THE

    def _attend_many(self, out_THE: torch.Tensor, q: torch.Tensor, scale: float, window: int, softcap: float) -> None:
        """Several tokens of a sequence at once, sequence by sequence, into their rows of `out_THE`."""
        for start, end, length, table_M in self.context.many:
            keys = self.k_BGDP[table_M].permute(1, 0, 3, 2).flatten(1, 2)[None, :, :length]
            values = self.v_BGPE[table_M].transpose(0, 1).flatten(1, 2)[None, :, :length]
            mixed = scaled_dot_product(q[:, :, start:end], keys, values, None, scale, True, window, softcap, 0.0)
            out_THE[start:end] = mixed[0].transpose(0, 1)

    def _attend_single(self, q: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
        """The one token of several sequences, each over its own cache: [N, H, E]."""
        context, groups = self.context, self.shape.kv_heads
        q_NGRD = q[0, :, context.single_rows].transpose(0, 1).unflatten(1, (groups, -1))
        k_NGDS = self.k_BGDP[context.single_tables].permute(0, 2, 3, 1, 4).flatten(3)
        v_NGSE = self.v_BGPE[context.single_tables].transpose(1, 2).flatten(2, 3)
        scores = q_NGRD @ k_NGDS * scale  # [N, G, R, S]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(scores.shape[-1], device=q.device)
        ends = context.single_lengths[:, None]
        hidden = at >= ends if not window else (at >= ends) | (at < ends - window)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(v_NGSE.dtype)
        return (weights @ v_NGSE).flatten(1, 2)
