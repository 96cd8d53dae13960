"""Channel: what is sent arrives, bit for bit or as its codec has it, whatever the order; a lost peer is named."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from nesa_ray.cluster.topology import Link
from nesa_ray.errors import PeerLost, Timeout
from nesa_ray.runtime.channel import Address, Channel, Kind, LocalChannel, Mailbox, RecordingChannel, SocketChannel, Tag
from nesa_ray.runtime.codec import CODECS, FLOAT_CODECS
from nesa_ray.runtime.link_codec import Encoder, LinkCodec


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
    torch.tensor([1 + 2j, 3 - 1j]).conj().imag,  # whose sign is a flag
    torch.arange(5, dtype=torch.int32),
    torch.tensor([True, False]),
    torch.tensor(3.5),
    torch.empty(0, 4),
    torch.randn(600, 700),
    torch.randint(0, 255, (11,), dtype=torch.uint8),
    torch.randn(4)[::2][:1],
    torch.arange(4)[::2][:1],
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


def test_messages_are_handed_out_once_each_whoever_waits() -> None:
    """Some of those that wait give up just as theirs arrives: then it is theirs, or stays for the next."""
    mailbox, n = Mailbox(), 400
    tags = [Tag(Kind.FORWARD, "x", i) for i in range(3)]
    got: list[float] = []

    def take(tag: Tag) -> None:
        while len(got) < len(tags) * n:
            with contextlib.suppress(Timeout):
                message = mailbox.take(tag, 1e-4)
                assert message is not None
                got.append(float(message))

    threads = [threading.Thread(target=take, args=(t,)) for t in tags for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(n):
        for k, tag in enumerate(tags):
            mailbox.put(tag, torch.tensor(float(k * n + i)))
        if i % 4 == 0:
            time.sleep(1e-4)
    for thread in threads:
        thread.join(30)
    assert sorted(got) == [float(i) for i in range(len(tags) * n)]
    assert not any(mailbox.has(t) for t in tags)


def test_a_failure_ends_every_wait_and_takes_nothing_that_has_arrived() -> None:
    mailbox, tag = Mailbox(), Tag(Kind.FORWARD, "x", 0)
    raised: list[BaseException] = []

    def take(index: int) -> None:
        try:
            mailbox.take(Tag(Kind.FORWARD, "y", index), None)
        except PeerLost as e:
            raised.append(e)

    threads = [threading.Thread(target=take, args=(i // 2,)) for i in range(6)]
    for thread in threads:
        thread.start()
    mailbox.put(tag, torch.ones(1))
    time.sleep(0.05)
    mailbox.fail(PeerLost("gone"))
    for thread in threads:
        thread.join(10)
    assert [str(e) for e in raised] == ["gone"] * 6
    mailbox.fail(PeerLost("once more"))
    assert mailbox.take(tag, None) is not None
    with pytest.raises(PeerLost, match="gone"):
        mailbox.take(tag, None)


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
        assert c.sent_bytes == c.raw_bytes > 0
    assert [m.wire_bytes for c in (a, b) for m in c.messages] == [16, None, 0, None]
    a.clear()
    assert not a.messages


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{tuple(t.shape)}")
@pytest.mark.parametrize("codec", list(FLOAT_CODECS))
def test_encoded(pair: tuple[SocketChannel, SocketChannel], codec: str, tensor: torch.Tensor) -> None:
    """Activations and gradients within the codec's bound, all else as it was; the receiver isn't told how.

    Integers are exact whatever carries them, and smaller if it is an activation or an input.
    """
    floats = tensor.is_floating_point()
    a, b = pair
    a.encode_with({"b": LinkCodec(activations=codec, gradients=codec)})
    tags = [Tag(kind, "x", 0) for kind in Kind]
    sent = [a.send("b", tag, tensor) for tag in tags]
    got = {tag.kind: b.recv(tag, 5) for tag in tags}
    coder = CODECS[codec if floats else "planes"]
    coded = (Kind.FORWARD, Kind.GRADIENT) if floats else (Kind.FORWARD, Kind.GRADIENT, Kind.INPUT)
    payload = coder.encode(tensor)
    wire_bytes = tensor.nbytes if payload is None else payload.nbytes
    for tag, of in zip(tags, sent, strict=True):
        value = got[tag.kind]
        assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
        if tag.kind in coded:
            assert ((value.double() - tensor.double()).abs() <= coder.bound(tensor)).all()
            assert of.wire_bytes == wire_bytes
        else:
            assert torch.equal(value, tensor)
            assert of.wire_bytes == tensor.nbytes
    assert a.raw_bytes - a.sent_bytes == len(coded) * (tensor.nbytes - wire_bytes)


@pytest.mark.parametrize("codec", list(FLOAT_CODECS))
def test_the_same_bits_in_one_process_over_sockets_and_to_oneself(
    pair: tuple[SocketChannel, SocketChannel], codec: str
) -> None:
    """Several micro-batches, of activations and of gradients, with what error feedback makes of them."""
    a, b = pair
    of_links = {peer: LinkCodec(activations=codec, gradients=codec) for peer in ("a", "b")}
    a.encode_with(of_links)
    mailboxes: dict[str, Mailbox] = {}
    here, there = LocalChannel("a", mailboxes, Encoder(of_links)), LocalChannel("b", mailboxes)
    g = torch.Generator().manual_seed(0)
    for i in range(4):
        for kind in (Kind.FORWARD, Kind.GRADIENT):
            tag, x = Tag(kind, "x", i), torch.randn(30, 70, generator=g)
            for channel, peer in ((a, "b"), (a, "a"), (here, "b")):
                channel.send(peer, tag, x)
            received = [c.recv(tag, 5) for c in (a, b, there)]
            assert not torch.equal(received[0], x)
            assert all(torch.equal(r, received[0]) for r in received)
    assert here.raw_bytes == 8 * x.nbytes
    assert here.sent_bytes < 0.6 * here.raw_bytes


def test_encoding_can_be_switched_off(pair: tuple[SocketChannel, SocketChannel]) -> None:
    """For the messages sent meanwhile."""
    a, b = pair
    encoder = a.encode_with({"b": LinkCodec(activations="int8")})
    x = torch.randn(10, 100)
    for i, on in enumerate((True, False, True)):
        encoder.on = on
        a.send("b", Tag(Kind.FORWARD, "x", i), x)
    exact = [torch.equal(b.recv(Tag(Kind.FORWARD, "x", i), 5), x) for i in range(3)]
    assert exact == [False, True, False]


class Slow:
    """A socket whose first write waits for `busy`; it notes how many buffers each write has."""

    def __init__(self, sock: socket.socket) -> None:
        self.writes: list[int] = []
        self.busy, self.began = threading.Event(), threading.Event()
        self._sock = sock

    def sendmsg(self, buffers: Sequence[Any], ancillary: Sequence[Any] = (), flags: int = 0) -> int:
        self.writes.append(len(buffers))
        self.began.set()
        assert self.busy.wait(5)
        data = b"".join(buffers)
        self._sock.sendall(data)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def test_small_messages_that_wait_become_one_write(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, b = pair
    writer = a._writers["b"]
    slow = writer._sock = Slow(writer._sock)  # type: ignore[assignment]
    a.send("b", Tag(Kind.CONTROL, "first", 0), torch.zeros(1 << 18))  # so large that it isn't written at once
    assert slow.began.wait(5)
    for i in range(50):
        a.send("b", Tag(Kind.FORWARD, f"request {i}", i), torch.full((64,), float(i)))
    a.send("b", Tag(Kind.FORWARD, "large", 0), torch.ones(1 << 18))
    a.send("b", Tag(Kind.CONTROL, "after it", 0), torch.tensor(1))
    slow.busy.set()
    assert all(b.recv(Tag(Kind.FORWARD, f"request {i}", i), 5).tolist() == [i] * 64 for i in range(50))
    assert b.recv(Tag(Kind.FORWARD, "large", 0), 5).sum() == 1 << 18
    assert int(b.recv(Tag(Kind.CONTROL, "after it", 0), 5)) == 1
    assert slow.writes == [2, 2 * 51, 2]  # a header and a payload each


def test_messages_that_dont_fit_into_the_connection_stay_in_order(pair: tuple[SocketChannel, SocketChannel]) -> None:
    a, b = pair
    read, tag = threading.Event(), Tag(Kind.CONTROL, "x", 0)
    b.mailbox.on_message = lambda tag, tensor: not read.wait(30)  # nothing is read, and the connection fills up
    rows = [torch.full((10**e,), float(i)) for i, e in enumerate([1, 3, 4, 5, 2] * 60)]
    began = time.monotonic()
    for row in rows:
        a.send("b", tag, row)
    assert time.monotonic() - began < 5
    assert a._writers["b"]._queued > 0  # or this shows nothing
    read.set()
    for row in rows:
        got = b.recv(tag, 10)
        assert got is not None
        assert torch.equal(got, row)
    deadline = time.monotonic() + 5
    while a._writers["b"]._queued and time.monotonic() < deadline:
        time.sleep(0.01)
    a.send("b", tag, torch.tensor(1))
    assert a._writers["b"]._queued == 0  # written by who sent it
    assert int(b.recv(tag, 5)) == 1


class Stalling:
    """Passes bytes from one connection on to an address; none while `stalled` is set."""

    def __init__(self, to: Address) -> None:
        self.stalled = threading.Event()
        self._to = to
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._server.getsockname()[1])
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        source, _ = self._server.accept()
        with source, socket.create_connection((self._to.host, self._to.port)) as sink:
            while data := source.recv(1 << 16):
                while self.stalled.is_set():
                    time.sleep(0.01)
                sink.sendall(data)


def test_a_link_that_stalls_loses_nothing() -> None:
    """Nor does it hold up who sends; the connection's own limits are far longer than this stall."""
    token = SocketChannel.new_token()
    a, b = SocketChannel("a", token), SocketChannel("b", token)
    between = Stalling(b.address)
    a.connect({"b": between.address})
    a.encode_with({"b": LinkCodec(activations="int8")})
    tensors = [torch.randn(1 << 19, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    began = time.monotonic()
    for i, x in enumerate(tensors):
        if i == 5:
            assert b.recv(Tag(Kind.FORWARD, "x", 0), 5) is not None
            between.stalled.set()
            threading.Timer(1.0, between.stalled.clear).start()
        a.send("b", Tag(Kind.FORWARD, "x", i), x)
    assert time.monotonic() - began < 0.9
    for i, x in enumerate(tensors[1:], 1):
        assert (b.recv(Tag(Kind.FORWARD, "x", i), 10) - x).abs().max() < 6 / 253
    assert time.monotonic() - began > 1
    a.close()
    b.close()


def test_a_dead_peer_is_noticed_in_half_a_minute(pair: tuple[SocketChannel, SocketChannel]) -> None:
    """Whether something was sent to it or not, at both ends of a connection; a stall of ten seconds isn't a death."""
    a, b = pair
    while not b._accepted or not b._accepted[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        time.sleep(0.01)  # until its reader has begun
    a.send("b", Tag(Kind.FORWARD, "x", 0), torch.zeros(1))
    b.recv(Tag(Kind.FORWARD, "x", 0), 10)
    for sock in (a._writers["b"]._sock, b._accepted[0]):
        of = {n: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{n}")) for n in
              ("USER_TIMEOUT", "KEEPIDLE", "KEEPINTVL", "KEEPCNT")}  # fmt: skip
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert of["USER_TIMEOUT"] == 30_000
        assert of["KEEPIDLE"] + of["KEEPINTVL"] * of["KEEPCNT"] == 30


def over_sockets(link: Link) -> tuple[Channel, Channel]:
    token = SocketChannel.new_token()
    a, b = SocketChannel("a", token), SocketChannel("b", token)
    a.connect({"b": b.address}, links={"b": link}, emulate=True)
    return a, b


def in_one_process(link: Link) -> tuple[Channel, Channel]:
    mailboxes: dict[str, Mailbox] = {}
    return LocalChannel("a", mailboxes, links={"b": link}), LocalChannel("b", mailboxes)


@pytest.mark.alone
@pytest.mark.parametrize("make", [over_sockets, in_one_process])
def test_an_emulated_link(make: Callable[[Link], tuple[Channel, Channel]]) -> None:
    """Messages take turns at its rate and each arrives a latency later; an idle link doesn't save up its rate."""
    link, x = Link(1e6, 0.1), torch.zeros(10_000)
    a, b = make(link)
    rounds = []
    for r in range(3):
        time.sleep(0.05)
        tags = [Tag(Kind.FORWARD, f"round {r}", i) for i in range(5)]
        began = time.perf_counter()
        for tag in tags:
            a.send("b", tag, x)
        assert time.perf_counter() - began < link.latency_s
        arrived = []
        for tag in tags:
            assert torch.equal(b.recv(tag, 5), x)
            arrived.append(time.perf_counter() - began)
        rounds.append(arrived)
    expected = [(i + 1) * x.nbytes / link.bytes_per_s + link.latency_s for i in range(5)]
    quickest = [min(times) for times in zip(*rounds, strict=True)]  # what else runs here only ever delays
    assert quickest == pytest.approx(expected, rel=0.05)
    a.close()
    b.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't pace")
@pytest.mark.parametrize(("link", "least_s"), [(Link(4e6, 0.01), 0.35), (Link(1e9), 0.0)])
def test_a_slow_link_is_not_sent_more_than_it_can(link: Link, least_s: float) -> None:
    """Two megabytes handed over at once take half a second; over a fast link none."""
    token = SocketChannel.new_token()
    a, b = SocketChannel("a", token), SocketChannel("b", token)
    try:
        a.connect({"b": b.address}, links={"b": link})
        began = time.perf_counter()
        for i in range(20):
            a.send("b", Tag(Kind.FORWARD, "x", i), torch.zeros(25_000))
        for i in range(20):
            b.recv(Tag(Kind.FORWARD, "x", i), 10)
        assert least_s < time.perf_counter() - began < least_s + 0.4
    finally:
        a.close()
        b.close()
