"""Choosing tokens, at the stage that makes the logits.

The random number of a choice depends on the request's seed and on how many tokens it has, not on what else is in the
batch, on preemption, or on the number of stages: a seed gives the same output wherever and with whomever it runs.

Shapes: R rows, V vocabulary, K likeliest tokens asked for.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import struct
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nesa_ray.serving.native.choice import Asked, Chooser
from nesa_ray.serving.request import Logprob
from nesa_ray.serving.scheduler import Sequence

RESULT_HEAD = 2  # columns of a result row before the likeliest tokens: token id, its log-probability


@dataclass(eq=False, slots=True)
class Slot:
    """What the sampling stage keeps of a request.

    asked    how its tokens are chosen
    bias     token -> what is added to its logit
    counts_V, seen_V
             occurrences in the output, and whether in prompt or output; only where penalised
    """

    asked: Asked
    seed: int
    position: int
    bias: dict[int, float]
    counts_V: np.ndarray | None = None
    seen_V: np.ndarray | None = None
    _biases: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        asked = self.asked
        if self.bias:
            count = len(self.bias)
            self._biases = (ctypes.c_int64 * count)(*self.bias), (ctypes.c_float * count)(*self.bias.values())
            asked.bias_tokens, asked.bias = (ctypes.addressof(of) for of in self._biases)
            asked.biases = count
        if self.counts_V is not None and self.seen_V is not None:
            asked.counts, asked.seen = self.counts_V.ctypes.data, self.seen_V.ctypes.data

    def next(self) -> Asked:
        """What is asked for its next token."""
        if self.asked.temperature:
            self.asked.uniform = uniform(self.seed, self.position)
        return self.asked

    def said(self, token: int) -> None:
        """Notes its next token."""
        self.position += 1
        if self.counts_V is not None and self.seen_V is not None:
            self.counts_V[token] += 1
            self.seen_V[token] = True


class Sampler:
    """The slots of all running requests, and the choice of their next tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._slots: dict[int, Slot] = {}
        self._native = Chooser()

    def admit(self, admission: Mapping[str, Any]) -> None:
        """Sets a slot up for a request (see `admission`); a request before it in the slot is forgotten."""
        given = dict(admission)
        number, output, prompt = given.pop("slot"), given.pop("output"), given.pop("prompt")
        seed, position = given.pop("seed"), given.pop("position")
        bias = {int(t): float(b) for t, b in given.pop("bias").items() if int(t) < self.vocabulary}
        given["logprobs"] = -1 if given["logprobs"] is None else min(given["logprobs"], self.vocabulary)
        counts_V, seen_V = None, None
        if (given["repetition_penalty"], given["presence_penalty"], given["frequency_penalty"]) != (1, 0, 0):
            counts_V = np.bincount(np.array(output, dtype=np.int64), minlength=self.vocabulary).astype(np.float32)
            seen_V = counts_V > 0
            seen_V[prompt] = True
        self._slots[number] = Slot(Asked(**given), seed, position, bias, counts_V, seen_V)

    def choose(self, logits_RV: torch.Tensor, slots_R: Rows[int]) -> torch.Tensor:
        """The next token of each row: float64 [R, 2 + 2 K]: token id, log-probability, K likeliest ids, their own.

        Log-probabilities are the model's, before temperature and penalties; NaN where not asked for.
        """
        slots = [self._slots[s] for s in slots_R]
        asked = [s.next() for s in slots]
        most = max((a.logprobs for a in asked if a.logprobs > 0), default=0)
        result = torch.full((len(slots), RESULT_HEAD + 2 * most), math.nan, dtype=torch.float64)
        if self._native.can(logits_RV):
            self._native(logits_RV, asked, result)
        else:
            for row, logits_V, slot in zip(result, logits_RV.float(), slots, strict=True):
                _choose(row, logits_V, slot)
        for slot, token in zip(slots, result[:, 0].tolist(), strict=True):
            slot.said(int(token))
        return result


def _choose(row: torch.Tensor, logits_V: torch.Tensor, slot: Slot) -> None:
    """By torch, what the kernel does for a row."""
    asked, most = slot.asked, (len(row) - RESULT_HEAD) // 2
    edited_V = edit(logits_V, slot)
    token = int(edited_V.argmax()) if asked.temperature == 0 else draw(edited_V, asked)
    row[0] = token
    if asked.logprobs >= 0:
        logprobs_V = torch.log_softmax(logits_V, -1)
        row[1] = logprobs_V[token]
        values, ids = logprobs_V.sort(descending=True, stable=True)
        row[RESULT_HEAD : RESULT_HEAD + asked.logprobs] = ids[: asked.logprobs]
        row[RESULT_HEAD + most : RESULT_HEAD + most + asked.logprobs] = values[: asked.logprobs]


def edit(logits_V: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The logits with the request's penalties and biases; see request.Sampling."""
    asked, logits_V = slot.asked, logits_V.clone()
    if slot.counts_V is not None and slot.seen_V is not None:
        counts_V, seen_V = map(torch.from_numpy, (slot.counts_V, slot.seen_V))
        repeated = asked.repetition_penalty
        penalised = torch.where(logits_V > 0, logits_V / repeated, logits_V * repeated)
        logits_V = torch.where(seen_V, penalised, logits_V)
        logits_V -= asked.frequency_penalty * counts_V + asked.presence_penalty * (counts_V > 0)
    for token, bias in slot.bias.items():
        logits_V[token] += bias
    return logits_V


def draw(logits_V: torch.Tensor, asked: Asked) -> int:
    """A token drawn from softmax(logits / temperature), among those that top-k, then top-p, then min-p leave.

    Of equally likely ones the first is kept.  What is kept is in its own order: the one is drawn at which the sum of
    the probabilities so far exceeds the random number's share of their sum.
    """
    p_V = kept(logits_V, asked)
    total_V = p_V.cumsum(-1)
    at = int(torch.searchsorted(total_V, asked.uniform * float(total_V[-1]), right=True))
    return min(at, int(p_V.nonzero()[-1]))  # rounding at the very end


def kept(logits_V: torch.Tensor, asked: Asked) -> torch.Tensor:
    """The probabilities, float64, before what is cut off is 0; not scaled to 1 again."""
    p_V = torch.softmax(logits_V.double() / asked.temperature, -1)
    if asked.top_k or asked.top_p < 1:
        p_V, order_V = p_V.sort(descending=True, stable=True)
        if asked.top_k:
            p_V[asked.top_k :] = 0
        if asked.top_p < 1:
            before_V = p_V.cumsum(-1) - p_V
            p_V[1:][before_V[1:] >= asked.top_p * p_V.sum()] = 0  # the likeliest always stays
        p_V = torch.empty_like(p_V).scatter_(0, order_V, p_V)
    p_V[p_V < asked.min_p * p_V.max()] = 0
    return p_V


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
