"""One step of the engine as a message: which tokens, at which positions, whose they are and where their keys go.

Shapes: T tokens of the step, N sequences, M blocks of the longest block table, R rows whose results are wanted: S that
are sampled, then P whose hidden states are pooled; E embeddings that are then complete.
The tokens of all sequences lie one after the other, as a batch of one: [1, T].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nesa_ray.serving.scheduler import Work

_HEAD = 6


@dataclass(frozen=True, slots=True)
class Step:
    """All int64.

    tokens_T      token ids
    positions_T   position of each in its sequence
    places_T      where its key and value go: block · block size + place in the block
    starts_N1     sequence n has the tokens starts[n] … starts[n + 1] - 1
    lengths_N     tokens of the sequence after this step
    adapters_N    number of the adapter that its tokens are computed with; 0: none
    tables_NM     its blocks, filled up with 0
    rows_R        tokens that are sampled, and then those that are pooled
    slots_S       the slot of each that is sampled
    slots_P       the slot of each that is pooled
    slots_E       slots whose embeddings are complete with this step
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    places_T: torch.Tensor
    starts_N1: torch.Tensor
    lengths_N: torch.Tensor
    adapters_N: torch.Tensor
    tables_NM: torch.Tensor
    rows_R: torch.Tensor
    slots_S: torch.Tensor
    slots_P: torch.Tensor
    slots_E: torch.Tensor

    @classmethod
    def of(cls, work: list[Work], block_size: int) -> Step:
        """The message of a step's work."""
        counts = np.array([w.count for w in work], dtype=np.int64)
        first = np.array([w.start for w in work], dtype=np.int64)
        starts: npt.NDArray[np.int64] = np.zeros(len(work) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        lengths = first + counts
        tables: npt.NDArray[np.int64] = np.zeros((len(work), -(-int(lengths.max()) // block_size)), dtype=np.int64)
        for row, w, length in zip(tables, work, lengths, strict=True):
            used = w.sequence.blocks[: -(-int(length) // block_size)]
            row[: len(used)] = used
        owner: npt.NDArray[np.int64] = np.repeat(np.arange(len(work)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + first[owner]
        tokens = [t for w in work for t in w.sequence.tokens[w.start : w.start + w.count]]
        ends = starts[1:].tolist()
        sampled = [end - 1 for end, w in zip(ends, work, strict=True) if w.samples]
        pooled = [row for end, w in zip(ends, work, strict=True) for row in range(end - w.pooled, end)]
        return cls(
            tokens_T=torch.tensor(tokens, dtype=torch.int64),
            positions_T=torch.from_numpy(positions),
            places_T=torch.from_numpy(tables[owner, positions // block_size] * block_size + positions % block_size),
            starts_N1=torch.from_numpy(starts),
            lengths_N=torch.from_numpy(lengths),
            adapters_N=torch.tensor([w.sequence.adapter for w in work], dtype=torch.int64),
            tables_NM=torch.from_numpy(tables),
            rows_R=torch.tensor(sampled + pooled, dtype=torch.int64),
            slots_S=torch.tensor([w.sequence.slot for w in work if w.samples], dtype=torch.int64),
            slots_P=torch.tensor([w.sequence.slot for w in work for _ in range(w.pooled)], dtype=torch.int64),
            slots_E=torch.tensor([w.sequence.slot for w in work if w.embeds], dtype=torch.int64),
        )

    def pack(self) -> torch.Tensor:
        """One flat int64 tensor."""
        slots = (self.slots_S, self.slots_P, self.slots_E)
        sizes = (len(self.tokens_T), len(self.lengths_N), self.tables_NM.shape[1], *map(len, slots))
        head = torch.tensor(sizes, dtype=torch.int64)
        parts = (self.tokens_T, self.positions_T, self.places_T, self.starts_N1, self.lengths_N, self.adapters_N)
        return torch.cat([head, *parts, self.tables_NM.reshape(-1), self.rows_R, *slots])

    @classmethod
    def unpack(cls, message: torch.Tensor) -> Step:
        """Views into a packed message."""
        tokens, sequences, blocks, sampled, pooled, complete = message[:_HEAD].tolist()
        sizes = [tokens] * 3 + [sequences + 1, sequences, sequences, sequences * blocks]
        sizes += [sampled + pooled, sampled, pooled, complete]
        t, p, w, s, n, a, m, r, *slots = message[_HEAD:].split(sizes)
        return cls(t, p, w, s, n, a, m.view(sequences, blocks), r, *slots)
