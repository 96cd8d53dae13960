"""One step of the engine as a message: which tokens, at which positions, whose they are and where their keys go.

Shapes: T tokens of the step, N sequences, M blocks of the longest block table, R rows whose results are wanted: S that
are sampled, then P whose hidden states are pooled; E embeddings that are then complete.
The tokens of all sequences lie one after the other, as a batch of one: [1, T].
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass

import torch

from nesa_ray.serving.scheduler import Work

_HEAD = 8


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
    rows_R        tokens that are sampled, and then those that are pooled; the first token where there are none, for
                  operators refuse to have no rows
    slots_S       the slot of each that is sampled
    slots_P       the slot of each that is pooled
    slots_E       slots whose embeddings are complete with this step
    ahead         so many of its first tokens are still being chosen: for the first of `slots_S` (choices.py)
    alone         whether no other stage computes while one computes it: it is of the only sequence there is
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
    ahead: int
    alone: bool

    @classmethod
    def unpack(cls, message: torch.Tensor) -> Step:
        """Views into a packed message."""
        tokens, sequences, blocks, sampled, pooled, complete, ahead, alone = message[:_HEAD].tolist()
        sizes = [tokens] * 3 + [sequences + 1, sequences, sequences, sequences * blocks]
        sizes += [sampled + pooled, sampled, pooled, complete]
        t, p, w, s, n, a, m, r, chosen, held, whole = message[_HEAD:].split(sizes)
        r = r if len(r) else r.new_zeros(1)
        tables = m.view(sequences, blocks)
        return cls(t, p, w, s, n, a, tables, r, chosen, held, whole, ahead, bool(alone))


def pack_step(work: list[Work], block_size: int, *, alone: bool = False) -> torch.Tensor:
    """The message of a step's work: the fields of Step one after the other, flat int64, behind their sizes.

    Made of plain lists: between two steps a stage may wait for it, and few tokens are the usual case.
    """
    tokens: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    starts, lengths, adapters, tables = [0], [], [], []
    sampled: list[int] = []
    pooled: list[int] = []
    slots_s: list[int] = []
    slots_p: list[int] = []
    slots_e: list[int] = []
    most = -(-max(w.start + w.count for w in work) // block_size)
    for w in work:
        sequence, end = w.sequence, w.start + w.count
        used = sequence.blocks[: -(-end // block_size)]
        tokens += [0] if w.ahead else sequence.tokens[w.start : end]
        positions += range(w.start, end)
        places += [used[at // block_size] * block_size + at % block_size for at in range(w.start, end)]
        starts.append(len(tokens))
        lengths.append(end)
        adapters.append(sequence.adapter)
        tables += used
        tables += [0] * (most - len(used))
        if w.samples:
            sampled.append(len(tokens) - 1)
            slots_s.append(sequence.slot)
        pooled += range(len(tokens) - w.pooled, len(tokens))
        slots_p += [sequence.slot] * w.pooled
        if w.embeds:
            slots_e.append(sequence.slot)
    head = [len(tokens), len(work), most, len(slots_s), len(slots_p), len(slots_e), sum(w.ahead for w in work), alone]
    rows = sampled + pooled
    parts = (head, tokens, positions, places, starts, lengths, adapters, tables, rows, slots_s, slots_p, slots_e)
    return torch.frombuffer(array("q", itertools.chain.from_iterable(parts)), dtype=torch.int64)
