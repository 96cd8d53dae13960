"""Which codec a link gets: as it was asked for, or for `auto` by what the link, the message and the codecs take.

The rule of `auto` (choose_codec), for a message that crosses the link once per micro-batch.  It takes a link as long as
the slowest of encoding it, sending it and decoding it, for these overlap with those of other messages.  In this order:

1. the most exact of raw, bf16 and int8 for which that is at most a twentieth of the pace, the seconds that the slowest
   stage computes per micro-batch: there is nothing left to win;
2. else the one of the three that takes least (of equal ones, the most exact);
3. int4 in its place, if that one would still take longer than the pace, so that the link and not the machines would
   decide how long a step takes, and int4 takes less.

Latency is the same for all, so it decides nothing; int8_mixed is for models with outlier features, and on request only.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nesa_ray.cluster.topology import Link
from nesa_ray.errors import InvalidConfig
from nesa_ray.runtime.message import CODEC_NAMES, PLANES, RAW, Kind, Tag

if TYPE_CHECKING:
    from nesa_ray.runtime.codec import Payload

AUTO = "auto"
_INSTANT = Link()
HIDDEN = 1 / 20  # of the pace


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """What one core takes to encode and to decode a value, and the bytes that are sent of it."""

    encode_s: float
    decode_s: float
    sent_bytes: float

    def seconds(self, values: int, link: Link) -> float:
        """What a message of so many values holds up those behind it: the slowest of encoding, sending and decoding."""
        return values * max(self.encode_s, self.decode_s, self.sent_bytes / link.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCodec:
    """What is sent to one peer in: names of codecs, or auto, which goes by the link and the pace (choose_codec)."""

    activations: str = RAW
    gradients: str = RAW
    link: Link = _INSTANT
    pace_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises InvalidConfig for a codec that there isn't."""
        for name in (self.activations, self.gradients):
            if name not in (*CODEC_NAMES, AUTO):
                raise InvalidConfig(f"codec: needs one of {', '.join(CODEC_NAMES)} or {AUTO}, got {name!r}")

    def name(self, kind: Kind, tensor: torch.Tensor) -> str:
        """The codec of a message of this kind.  Integers, like labels, and masks lose nothing in theirs."""
        if kind is Kind.INPUT and tensor.is_floating_point():
            return RAW
        of_kind = {Kind.FORWARD: self.activations, Kind.INPUT: self.activations, Kind.GRADIENT: self.gradients}
        wanted = of_kind.get(kind, RAW)
        if wanted == AUTO:
            wanted = choose_codec(self.link, tensor.numel(), tensor.element_size(), self.pace_s, measured_speeds())
        return wanted if wanted == RAW or tensor.is_floating_point() else PLANES


def choose_codec(link: Link, values: int, value_bytes: int, pace_s: float, speeds: Mapping[str, CodecSpeed]) -> str:
    """The codec for messages of so many values that cross the link once per micro-batch: see above.

    value_bytes  of a value as it lies in memory
    pace_s       seconds that the slowest stage computes per micro-batch, forward and backward
    speeds       of bf16, int8 and int4
    """
    of = {RAW: CodecSpeed(0.0, 0.0, value_bytes), **speeds}
    seconds = {name: of[name].seconds(values, link) for name in (RAW, "bf16", "int8", "int4")}
    exact_first = (RAW, "bf16", "int8")
    hidden = next((name for name in exact_first if seconds[name] <= HIDDEN * pace_s), None)
    if hidden is not None:
        return hidden
    best = min(exact_first, key=seconds.__getitem__)
    return "int4" if seconds[best] > pace_s and seconds["int4"] < seconds[best] else best


@functools.cache
def measured_speeds() -> Mapping[str, CodecSpeed]:
    """Of each codec, on this core, once per process: takes some ten milliseconds after the kernels are compiled."""
    from nesa_ray.runtime.codec import FLOAT_CODECS

    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    out, speeds = torch.empty_like(x), {}
    for name, codec in FLOAT_CODECS.items():
        encode_s, decode_s, sent_bytes = math.inf, math.inf, 0
        for _ in range(10):
            began = time.perf_counter()
            payload = codec.encode(x)
            encoded = time.perf_counter()
            assert payload is not None
            codec.decode(payload, out)
            encode_s, decode_s = min(encode_s, encoded - began), min(decode_s, time.perf_counter() - encoded)
            sent_bytes = payload.nbytes
        speeds[name] = CodecSpeed(encode_s / x.numel(), decode_s / x.numel(), sent_bytes / x.numel())
    return speeds


class Encoder:
    """What one channel's messages are encoded with; remembers what gradients lost.

    codecs  by peer; a peer that isn't there gets everything raw
    on      False: everything is raw until it is True again (a run that compares, or a link that mustn't lose anything)

    With a codec that asks for it (int4), what encoding took from a gradient is added to the next gradient of the same
    name, so that the sum of what is sent stays within one message's error of the sum of what was meant: error feedback
    (Seide et al., 1-bit stochastic gradient descent, Interspeech 2014; Karimireddy et al., arXiv 1901.09847).
    """

    def __init__(self, codecs: Mapping[str, LinkCodec] | None = None) -> None:
        self.codecs = dict(codecs or {})
        self.on = True
        self._lost: dict[tuple[str, str], torch.Tensor] = {}
        if any({c.activations, c.gradients} != {RAW} for c in self.codecs.values()):
            measured_speeds()  # compiles the kernels, now and not at the first message

    def codec(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> str:
        """The name of the codec that this message gets."""
        of_link = self.codecs.get(peer)
        if of_link is None or not self.on or tensor is None:
            return RAW
        return of_link.name(tag.kind, tensor)

    def encode(self, codec: str, peer: str, tag: Tag, tensor: torch.Tensor) -> Payload | None:
        """The payload; None: the tensor goes raw.  Messages of one name must come in the order of their sending."""
        if codec == RAW:
            return None
        from nesa_ray.runtime.codec import CODECS

        coder = CODECS[codec]
        if not (coder.feedback and tag.kind is Kind.GRADIENT and tensor.is_floating_point()):
            return coder.encode(tensor)
        meant = tensor.detach().to("cpu", torch.float32).contiguous()
        lost = self._lost.pop((peer, tag.name), None)
        if lost is not None and lost.shape == meant.shape:
            meant = meant + lost
        payload = coder.encode(meant, tensor.dtype)
        if payload is not None:
            coder.decode(payload, sent := torch.empty_like(meant))
            self._lost[peer, tag.name] = meant.sub(sent)
        return payload

    def through(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
        """What the peer would receive, and the bytes of its payload: for messages that stay in the process."""
        if tensor is None:
            return None, 0
        codec = self.codec(peer, tag, tensor)
        payload = self.encode(codec, peer, tag, tensor)
        if payload is None:
            return tensor, tensor.nbytes
        return decoded(codec, payload, tensor.shape, tensor.dtype).to(tensor.device), payload.nbytes


def decoded(codec: str, payload: Payload, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A new tensor of what was encoded.  Raises ValueError when the payload doesn't fit it."""
    from nesa_ray.runtime.codec import CODECS

    tensor = torch.empty(shape, dtype=dtype)
    CODECS[codec].decode(payload, tensor)
    return tensor
