"""What a client asks for, and what it gets back piece by piece."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nesa_ray.errors import InvalidInput

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when a sequence ends.

    max_tokens            most output tokens; None: up to the context
    temperature           0 takes the most likely token
    top_k, top_p, min_p   keep the k most likely; the fewest that hold p of the probability; those with at least
                          min_p of the likeliest one's probability (arXiv 2407.01082)
    seed                  makes the choice repeatable, whatever else is in the batch
    stop                  texts that end the output, and aren't part of it
    stop_token_ids        tokens that end the output, besides the model's own
    ignore_eos            go on after the model's own end
    logprobs              None: none; k ≥ 0: the chosen token's, and the k likeliest
    repetition_penalty    divides (if positive, else multiplies) the logit of every token seen (arXiv 1909.05858)
    presence_penalty, frequency_penalty
                          taken off the logit of each output token: once, and once per occurrence
    logit_bias            token id -> what is added to its logit
    embed                 no output at all: the prompt's embedding instead
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    embed: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidInput naming the field."""
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _integer("top_k", self.top_k, 0, 1 << 31)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 1 << 31)
        if self.seed is not None:
            _integer("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if isinstance(self.stop, str) or any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidInput("stop: needs texts of at least one character")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 1 << 31)
            _within(f"logit_bias[{token}]", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _within(name: str, value: Any, low: float, high: float) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        raise InvalidInput(f"{name}: needs a number from {low} to {high}, got {value!r}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInput(f"{name}: needs an integer from {low} to {high}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of an output token under the model, and the likeliest tokens with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New output of one request.  `finish`: None, "stop" or "length"; `stopped_by`: the text or token that ended it.

    `embedding`: of a text that is embedded, its vector, float32 [D].
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish: str | None = None
    stopped_by: str | int | None = None
    cached_tokens: int = 0
    embedding: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole output.  `prompt_tokens` of which `cached_tokens` came from the prefix cache."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish: str
    prompt_tokens: int
    cached_tokens: int = 0


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces that follow each other, as one."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[-1],
        text="".join(p.text for p in pieces),
        token_ids=tuple(t for p in pieces for t in p.token_ids),
        logprobs=tuple(x for p in pieces for x in p.logprobs),
    )


def completion(prompt_tokens: int, pieces: Sequence[Piece]) -> Completion:
    """The whole of an output from its pieces."""
    whole = joined(pieces)
    return Completion(
        text=whole.text,
        token_ids=whole.token_ids,
        logprobs=whole.logprobs,
        finish=str(whole.finish),
        prompt_tokens=prompt_tokens,
        cached_tokens=whole.cached_tokens,
    )
