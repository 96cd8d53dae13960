"""Operators that act otherwise in training than in evaluation: random ones, normalisation by batch, written buffers.

A random operator draws from (the step's seed, its own name), not from a generator that others share: so one stage or
five, computed once or again for the backward, give the same values.  In evaluation (no seed) dropout is the identity,
running statistics are used as they are, and nothing is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import nesa_ray.graph.attention  # noqa: F401 - registers nesa::attention

aten = torch.ops.aten

_DROPOUTS = {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout}
RANDOM = {
    *_DROPOUTS, aten.native_dropout, aten.rand, aten.randn, aten.rand_like, aten.randn_like, aten.bernoulli,
    aten.randint, aten.randint_like, aten.randperm, aten.multinomial, aten.normal, aten.normal_functional,
    aten.uniform, aten.exponential, aten.rrelu,
}  # fmt: skip
_ATTENTIONS = {aten.scaled_dot_product_attention: 4, torch.ops.nesa.attention: 8}  # position of the dropout


@dataclass(frozen=True, slots=True)
class Mode:
    """How a stage runs one micro-batch.

    seed        of its random operators; None leaves them to torch's generator
    again       it is computed a second time (recompute): the same values, and no buffer is written twice
    evaluation  dropout is off, running statistics are read, buffers aren't written
    """

    seed: int | None = None
    again: bool = False
    evaluation: bool = False


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed of the parts, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def bind_mode(
    name: str, operator: Any, args: tuple[Any, ...], function: Callable[..., Any]
) -> Callable[..., Any] | None:
    """`function` as one that also takes `mode`, or None where the mode makes no difference.

    `name` is the instruction's, `args` its arguments; `function` is what the operator is bound to.
    """
    packet = getattr(operator, "overloadpacket", None)
    if packet in (aten.batch_norm, aten.instance_norm):
        return _batch_norm(function) if args[5] and args[3] is not None else None
    if packet in _DROPOUTS:
        return _dropout(name, function, packet) if args[2] and args[1] else None
    if packet in _ATTENTIONS:
        at = _ATTENTIONS[packet]
        return _attention(name, function, at) if len(args) > at and args[at] else None
    if packet in RANDOM:
        return _drawn(name, function)
    schema = getattr(operator, "_schema", None)
    if schema is not None and schema.is_mutable:
        return _written(function)
    return None


def _drawn(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def draw(*args: Any, mode: Mode, **kwargs: Any) -> Any:
        if mode.seed is None:
            return function(*args, **kwargs)
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            torch.manual_seed(derive_seed(mode.seed, name))
            return function(*args, **kwargs)

    return draw


def _dropout(name: str, function: Callable[..., Any], packet: Any) -> Callable[..., Any]:
    seeded = _drawn(name, function)

    def drop(x: torch.Tensor, p: float, train: bool, *, mode: Mode) -> torch.Tensor:
        if mode.evaluation:
            return x
        if packet is not aten.dropout or mode.seed is None:
            return seeded(x, p, train, mode=mode)
        generator = torch.Generator(x.device).manual_seed(derive_seed(mode.seed, name))
        kept = torch.empty_like(x, requires_grad=False).bernoulli_(1 - p, generator=generator)
        return x * kept.div_(1 - p) if p < 1 else x * kept

    return drop


def _attention(name: str, function: Callable[..., Any], at: int) -> Callable[..., Any]:
    seeded = _drawn(name, function)

    def attend(*args: Any, mode: Mode, **kwargs: Any) -> Any:
        if mode.evaluation:
            return function(*args[:at], 0.0, *args[at + 1 :], **kwargs)
        return seeded(*args, mode=mode, **kwargs)

    return attend


def _batch_norm(function: Callable[..., Any]) -> Callable[..., Any]:
    def normalise(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, train: bool, *args: Any, mode: Mode) -> Any:
        if mode.again:
            mean = variance = None
        return function(x, weight, bias, mean, variance, not mode.evaluation, *args)

    return normalise


def _written(function: Callable[..., Any]) -> Callable[..., Any]:
    def write(target: torch.Tensor, *args: Any, mode: Mode, **kwargs: Any) -> torch.Tensor:
        if mode.evaluation or mode.again:
            return target
        with torch.no_grad():
            return function(target, *args, **kwargs)

    return write
