"""Channel: what is sent arrives, bit for bit, whatever the order; a lost peer is named."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from nesa_ray.errors import PeerLost, Timeout
from nesa_ray.runtime.channel import Kind, RecordingChannel, SocketChannel, Tag


@pytest.fixture
def pair() -> Iterator[tuple[SocketChannel, SocketChannel]]:
    token = SocketChannel.new_token()
    a, b = SocketChannel("a", token), SocketChannel("b", token)
    a.connect({"b": b.address})
    b.connect({"a": a.address})
    yield a, b
    a.close()
    b.close()


TENSORS = [
    torch.randn(3, 5),
    torch.randn(2, 3, 4, dtype=torch.float64).transpose(0, 2),
    torch.randn(7).to(torch.bfloat16),
    torch.randn(7).to(torch.float16),
    torch.arange(6).reshape(2, 3),
    torch.arange(5, dtype=torch.int32),
    torch.tensor([True, False]),
    torch.tensor(3.5),
    torch.empty(0, 4),
    torch.randn(600, 700),
    torch.randint(0, 255, (11,), dtype=torch.uint8),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{tuple(t.shape)}")
def test_tensors_arrive_as_they_were(pair: tuple[SocketChannel, SocketChannel], tensor: torch.Tensor) -> None:
    a, b = pair
    tag = Tag(Kind.FORWARD, "value", 3)
    a.send("b", tag, tensor)
    got = b.recv(tag, 5)
    assert got is not None
    assert got.dtype == tensor.dtype
    assert torch.equal(got, tensor)


def test_no_tensor_arrives_as_none(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, b = pair
    a.send("b", Tag(Kind.GRADIENT, "x", 0), None)
    assert b.recv(Tag(Kind.GRADIENT, "x", 0), 5) is None


def test_receives_in_any_order_and_keeps_it_per_tag(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, b = pair
    for i in range(20):
        a.send("b", Tag(Kind.FORWARD, "x", i % 4), torch.tensor(i))
    for tag in (3, 1, 0, 2):
        values = [b.recv(Tag(Kind.FORWARD, "x", tag), 5) for _ in range(5)]
        assert [int(v) for v in values] == list(range(tag, 20, 4))


def test_sending_never_blocks(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, b = pair
    big = torch.zeros(4 << 20)
    began = time.monotonic()
    for i in range(16):
        a.send("b", Tag(Kind.FORWARD, "x", i), big)
    assert time.monotonic() - began < 1.0
    assert all(b.recv(Tag(Kind.FORWARD, "x", i), 20) is not None for i in range(16))


def test_to_itself(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, _ = pair
    a.send("a", Tag(Kind.INPUT, "x", 0), torch.ones(2))
    assert torch.equal(a.recv(Tag(Kind.INPUT, "x", 0), 1), torch.ones(2))


def test_timeout_names_what_was_awaited(pair: tuple[SocketChannel, SocketChannel]) -> None:
    with pytest.raises(Timeout, match=r"forward hidden\[7\] didn't arrive"):
        pair[0].recv(Tag(Kind.FORWARD, "hidden", 7), 0.05)


def test_a_lost_peer_ends_the_wait(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, b = pair
    threading.Timer(0.1, a.close).start()
    with pytest.raises(PeerLost, match="b lost a"):
        b.recv(Tag(Kind.FORWARD, "x", 0), 10)


def test_unreachable_peer_is_named() -> None:
    channel = SocketChannel("a", SocketChannel.new_token())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = type(channel.address)("127.0.0.1", port)
    with pytest.raises(PeerLost, match=f"a can't reach b at 127.0.0.1:{port}"):
        channel.connect({"b": address}, timeout_s=1)
    channel.close()


def test_a_stranger_is_turned_away(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, b = pair
    stranger = SocketChannel("stranger", SocketChannel.new_token())
    stranger.connect({"b": b.address})
    stranger.send("b", Tag(Kind.FORWARD, "x", 0), torch.ones(1))
    with pytest.raises(Timeout):
        b.recv(Tag(Kind.FORWARD, "x", 0), 0.3)
    stranger.close()
    a.send("b", Tag(Kind.FORWARD, "x", 0), torch.zeros(1))
    assert float(b.recv(Tag(Kind.FORWARD, "x", 0), 5)) == 0.0


def test_recorded_messages(pair) -> None:
    a, b = (RecordingChannel(c) for c in pair)
    a.send("b", Tag(Kind.FORWARD, "x", 3), torch.zeros(4))
    b.send("a", Tag(Kind.GRADIENT, "x", 3), None)
    b.recv(Tag(Kind.FORWARD, "x", 3), 10)
    assert a.recv(Tag(Kind.GRADIENT, "x", 3), 10) is None
    noted = [[(str(m.tag), m.to, m.n_bytes) for m in c.messages] for c in (a, b)]
    assert noted[0] == [("forward x[3]", "b", 16), ("gradient x[3]", None, 0)]
    assert noted[1] == [("gradient x[3]", "a", 0), ("forward x[3]", None, 16)]
    for c in (a, b):
        assert all(m.start_s <= m.end_s for m in c.messages)
        assert c.messages[0].end_s <= c.messages[1].start_s
        assert c.sent_bytes > 0
