"""Which codec a link gets."""

import pytest
import torch

from nesa_ray.cluster.topology import Link
from nesa_ray.errors import InvalidConfig
from nesa_ray.runtime.codec import FLOAT_CODECS
from nesa_ray.runtime.link_codec import CodecSpeed, Encoder, LinkCodec, choose_codec, measured_speeds
from nesa_ray.runtime.message import Kind, Tag

# Seconds a value: a gigabyte of fp32 a second for each step of encoding or decoding.
SPEEDS = {
    "bf16": CodecSpeed(2e-9, 2e-9, 2.0), "int8": CodecSpeed(4e-9, 3e-9, 1.0),
    "int8_mixed": CodecSpeed(8e-9, 4e-9, 1.0), "int4": CodecSpeed(8e-9, 4e-9, 0.53),
}  # fmt: skip
VALUES = 1 << 17


@pytest.mark.parametrize(
    ("bytes_per_s", "pace_s", "expected"),
    [
        (float("inf"), 0.0, "raw"),  # nothing to win on any link that is faster than encoding
        (2e9, 0.0, "raw"),  # raw 2 ns a value, bf16 2 ns
        (1.2e9, 0.0, "bf16"),  # 3.3 against 2 and 4
        (1e8, 0.1, "bf16"),  # raw 5.2 ms, bf16 2.6: a twentieth of the pace is 5
        (1e8, 0.2, "raw"),
        (1e8, 0.01, "int8"),  # 1.3 ms, more than a twentieth, less than the pace
        (1e6, 0.2, "int8"),  # 131 ms
        (1e6, 0.1, "int4"),  # the link would decide how long a step takes
        (1e3, 1e9, "raw"),
    ],
)
def test_auto(bytes_per_s: float, pace_s: float, expected: str) -> None:
    for latency_s in (0.0, 0.1):
        assert choose_codec(Link(bytes_per_s, latency_s), VALUES, 4, pace_s, SPEEDS) == expected


def test_auto_for_values_of_two_bytes() -> None:
    """bf16 tensors are as small raw as in bf16."""
    assert choose_codec(Link(1.2e9), VALUES, 4, 0.0, SPEEDS) == "bf16"
    assert choose_codec(Link(1.2e9), VALUES, 2, 0.0, SPEEDS) == "raw"


def test_slower_links_never_send_more() -> None:
    sent = {"raw": 4.0} | {n: s.sent_bytes for n, s in SPEEDS.items()}
    for pace_s in (0.0, 0.01, 1.0):
        chosen = [sent[choose_codec(Link(1e10 / 2**i), VALUES, 4, pace_s, SPEEDS)] for i in range(30)]
        assert chosen == sorted(chosen, reverse=True)


def test_measured() -> None:
    """512 KB of fp32 to int8 and back takes well below a millisecond of one core."""
    speeds = measured_speeds()
    assert set(speeds) == set(FLOAT_CODECS)
    assert measured_speeds() is speeds
    assert VALUES * (speeds["int8"].encode_s + speeds["int8"].decode_s) < 0.5e-3
    assert speeds["int8"].sent_bytes == pytest.approx(1, abs=0.01)
    assert speeds["int4"].sent_bytes == pytest.approx(0.46, abs=0.015)


def test_by_peer_kind_and_switch() -> None:
    encoder = Encoder({
        "b": LinkCodec(activations="bf16", gradients="int4"),
        "slow": LinkCodec(activations="auto", gradients="auto", link=Link(1e5, 0.05), pace_s=0.1),
        "fast": LinkCodec(activations="auto", link=Link(1e12), pace_s=0.1),
    })  # fmt: skip
    x = torch.ones(64, 64)

    def codec(peer: str, kind: Kind) -> str:
        return encoder.codec(peer, Tag(kind, "x", 0), x)

    assert [codec("b", k) for k in Kind] == ["bf16", "int4", "raw", "raw", "raw", "raw"]
    assert [codec("slow", k) for k in (Kind.FORWARD, Kind.GRADIENT, Kind.WEIGHT)] == ["int8", "int8", "raw"]
    assert [codec("fast", k) for k in Kind] == ["raw"] * 6
    assert [codec("unknown", k) for k in Kind] == ["raw"] * 6
    assert encoder.codec("b", Tag(Kind.FORWARD, "x", 0), None) == "raw"
    labels = torch.zeros(64, 64, dtype=torch.int64)
    for peer, expected in (("b", "planes"), ("slow", "planes"), ("fast", "raw"), ("unknown", "raw")):
        assert encoder.codec(peer, Tag(Kind.INPUT, "labels", 0), labels) == expected
    encoder.on = False
    assert codec("b", Kind.FORWARD) == codec("slow", Kind.GRADIENT) == "raw"


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(InvalidConfig, match=r"codec: needs one of raw, .* or auto, got 'int3'"):
        LinkCodec(gradients="int3")
