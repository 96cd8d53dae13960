"""Choosing tokens, at the stage that makes the logits.

The random number of a choice depends on the request's seed and on how many tokens it has, not on what else is in the
batch, on preemption, or on the number of stages: a seed gives the same output wherever and with whomever it runs.

Shapes: R rows, V vocabulary, K likeliest tokens asked for.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nesa_ray.serving.native.choice import Likeliest
from nesa_ray.serving.request import Logprob
from nesa_ray.serving.scheduler import Sequence

RESULT_HEAD = 2  # columns of a result row before the likeliest tokens: token id, its log-probability


@dataclass(eq=False, slots=True)
class Slot:
    """What the sampling stage keeps of a request.  `counts_V` (output tokens) and `seen_V` only where penalised."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int
    logprobs: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias: dict[int, float]
    counts_V: torch.Tensor | None = None
    seen_V: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken as the logits stand."""
        return self.temperature == 0 and self.logprobs is None and not self.edits

    @property
    def edits(self) -> bool:
        """Whether logits are changed before the choice."""
        return self.counts_V is not None or bool(self.bias)


class Sampler:
    """The slots of all running requests, and the choice of their next tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._slots: dict[int, Slot] = {}
        self._likeliest = Likeliest()

    def admit(self, admission: Mapping[str, Any]) -> None:
        """Sets a slot up for a request (see `admission`); a request before it in the slot is forgotten."""
        given = dict(admission)
        number, output, prompt = given.pop("slot"), given.pop("output"), given.pop("prompt")
        bias = {int(t): float(b) for t, b in given.pop("bias").items() if int(t) < self.vocabulary}
        slot = Slot(**given, bias=bias)
        if (slot.repetition_penalty, slot.presence_penalty, slot.frequency_penalty) != (1, 0, 0):
            slot.counts_V = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=self.vocabulary).float()
            prompt_V = torch.bincount(torch.tensor(prompt, dtype=torch.int64), minlength=self.vocabulary)
            slot.seen_V = (prompt_V > 0) | (slot.counts_V > 0)
        self._slots[number] = slot

    def choose(self, logits_RV: torch.Tensor, slots_R: Rows[int]) -> torch.Tensor:
        """The next token of each row: float64 [R, 2 + 2 K]: token id, log-probability, K likeliest ids, their own.

        Log-probabilities are the model's, before temperature and penalties; NaN where not asked for.
        """
        slots = [self._slots[s] for s in slots_R]
        if all(s.plain for s in slots):
            tokens = self._likeliest(logits_RV)
            result = torch.tensor([(token, math.nan) for token in tokens], dtype=torch.float64).view(-1, RESULT_HEAD)
        else:
            result = self._choose_each(logits_RV.float(), slots)
            tokens = result[:, 0].long().tolist()
        for slot, token in zip(slots, tokens, strict=True):
            slot.position += 1
            if slot.counts_V is not None and slot.seen_V is not None:
                slot.counts_V[token] += 1
                slot.seen_V[token] = True
        return result

    def _choose_each(self, logits_RV: torch.Tensor, slots: Rows[Slot]) -> torch.Tensor:
        most = max((s.logprobs for s in slots if s.logprobs is not None), default=0)
        result = torch.full((len(slots), RESULT_HEAD + 2 * most), float("nan"), dtype=torch.float64)
        for row, logits_V, slot in zip(result, logits_RV, slots, strict=True):
            edited_V = edit(logits_V, slot) if slot.edits else logits_V
            token = int(edited_V.argmax()) if slot.temperature == 0 else draw(edited_V, slot)
            row[0] = token
            if slot.logprobs is not None:
                logprobs_V = torch.log_softmax(logits_V, -1)
                row[1] = logprobs_V[token]
                top = logprobs_V.topk(min(slot.logprobs, self.vocabulary))
                row[RESULT_HEAD : RESULT_HEAD + len(top.indices)] = top.indices
                row[RESULT_HEAD + most : RESULT_HEAD + most + len(top.values)] = top.values
        return result


def edit(logits_V: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The logits with the request's penalties and biases; see request.Sampling."""
    logits_V = logits_V.clone()
    if slot.counts_V is not None and slot.seen_V is not None:
        penalised = torch.where(logits_V > 0, logits_V / slot.repetition_penalty, logits_V * slot.repetition_penalty)
        logits_V = torch.where(slot.seen_V, penalised, logits_V)
        logits_V -= slot.frequency_penalty * slot.counts_V + slot.presence_penalty * (slot.counts_V > 0)
    for token, bias in slot.bias.items():
        logits_V[token] += bias
    return logits_V


def draw(logits_V: torch.Tensor, slot: Slot) -> int:
    """A token drawn from softmax(logits / temperature), among those that top-k, top-p and min-p leave."""
    logits_V = logits_V / slot.temperature
    if slot.top_k or slot.top_p < 1:
        k = min(slot.top_k or len(logits_V), len(logits_V))
        values, order = logits_V.topk(k) if k < len(logits_V) else logits_V.sort(descending=True)
    else:
        values, order = logits_V, None
    p = torch.softmax(values.double(), -1)
    if slot.top_p < 1:
        p[(p.cumsum(-1) - p) >= max(slot.top_p, 1e-12)] = 0  # the likeliest always stays
    if slot.min_p:
        p[p < slot.min_p * p.max()] = 0
    total = p.cumsum(-1)
    at = int(torch.searchsorted(total, uniform(slot.seed, slot.position) * float(total[-1]), right=True))
    at = min(at, int(p.nonzero()[-1]))  # rounding at the very end
    return int(order[at]) if order is not None else at


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def admission(sequence: Sequence) -> dict[str, Any]:
    """What the sampling stage needs to know of a request."""
    sampling = asdict(sequence.sampling)
    kept = ("top_k", "top_p", "min_p", "logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty")
    output = sequence.tokens[sequence.prompt_tokens :]
    return {
        **{k: sampling[k] for k in kept},
        "temperature": 0.0 if sequence.sampling.greedy else sequence.sampling.temperature,
        "bias": sequence.sampling.logit_bias,
        "slot": sequence.slot,
        "seed": sequence.seed,
        "position": len(output),
        "prompt": sequence.tokens[: sequence.prompt_tokens] if sequence.sampling.penalised else [],
        "output": output if sequence.sampling.penalised else [],
    }


def logprobs_of(row: list[float], asked: int | None) -> tuple[Logprob, ...]:
    """The log-probabilities in one row of a result, if they were asked for."""
    if asked is None:
        return ()
    most = (len(row) - RESULT_HEAD) // 2
    ids, values = row[RESULT_HEAD : RESULT_HEAD + most], row[RESULT_HEAD + most :]
    top = tuple((int(t), v) for t, v in zip(ids[:asked], values[:asked], strict=True))
    return (Logprob(int(row[0]), row[1], top),)
