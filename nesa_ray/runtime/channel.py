"""Channel: how tensors go from stage to stage, actor to actor; never through Ray.

A receiver names what it waits for by a Tag; messages arrive in any order.  Sending never blocks the caller, so a
schedule can't deadlock on buffers.  Two implementations: `LocalChannel` (several stages in one process) and
`SocketChannel` (one persistent TCP connection per pair of peers and direction; a typed header, no pickle).
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import torch

from nesa_ray.errors import PeerLost, Timeout


class Kind(IntEnum):
    """What a message carries."""

    FORWARD = 1  # a value, from the stage that makes it to one that reads it
    GRADIENT = 2  # the gradient of a value, back to the stage that made it
    INPUT = 3  # a user input or a target, from the stage that loads the data
    WEIGHT = 4  # a tied parameter's value, from its owner, once a step
    WEIGHT_GRADIENT = 5  # a tied parameter's summed gradient, back to its owner
    CONTROL = 6  # anything else the peers agree on


@dataclass(frozen=True, slots=True)
class Tag:
    """What a message is: its kind, the value's name, and the index of its micro-batch or step."""

    kind: Kind
    name: str
    index: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.name}[{self.index}]"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens."""

    host: str
    port: int


class Channel(Protocol):
    """Sends to peers by their name; receives by tag."""

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far."""

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> None:
        """Queues the tensor (None: "there is none") and returns at once.  The tensor must not change afterwards."""

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """Waits for the message and removes it; raises Timeout or PeerLost."""

    def close(self) -> None:
        """Flushes what is queued and frees threads and sockets."""


class Mailbox:
    """Messages that have arrived, by tag.  Thread-safe."""

    def __init__(self) -> None:
        self._arrived: dict[Tag, deque[torch.Tensor | None]] = {}
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self.on_message: Callable[[Tag, torch.Tensor | None], bool] | None = None

    def put(self, tag: Tag, tensor: torch.Tensor | None) -> None:
        """Delivers; a handler set as `on_message` that answers True takes the message instead."""
        if self.on_message is not None and self.on_message(tag, tensor):
            return
        with self._changed:
            self._arrived.setdefault(tag, deque()).append(tensor)
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Makes every present and future wait raise `error`."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def take(self, tag: Tag, timeout_s: float | None) -> torch.Tensor | None:
        """Waits for `tag`; raises Timeout, or the failure that was reported."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while tag not in self._arrived:
                if self._failure is not None:
                    raise self._failure
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise Timeout(f"channel: {tag} didn't arrive within {timeout_s} s")
                self._changed.wait(left)
            waiting = self._arrived[tag]
            tensor = waiting.popleft()
            if not waiting:
                del self._arrived[tag]
            return tensor


@dataclass(frozen=True, slots=True)
class MessageTime:
    """When a message was handed to the channel, for the peer `to`, or waited for (`to` is None): time.perf_counter."""

    tag: Tag
    to: str | None
    n_bytes: int
    start_s: float
    end_s: float


class RecordingChannel:
    """A channel that notes when each message is sent and waited for; the notes are the caller's to clear."""

    def __init__(self, channel: Channel) -> None:
        self.messages: list[MessageTime] = []
        self._channel = channel

    @property
    def sent_bytes(self) -> int:
        """See Channel."""
        return self._channel.sent_bytes

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> None:
        """See Channel."""
        start_s = time.perf_counter()
        self._channel.send(peer, tag, tensor)
        self._note(tag, peer, tensor, start_s)

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """See Channel."""
        start_s = time.perf_counter()
        tensor = self._channel.recv(tag, timeout_s)
        self._note(tag, None, tensor, start_s)
        return tensor

    def close(self) -> None:
        """See Channel."""
        self._channel.close()

    def _note(self, tag: Tag, to: str | None, tensor: torch.Tensor | None, start_s: float) -> None:
        n_bytes = 0 if tensor is None else tensor.numel() * tensor.element_size()
        self.messages.append(MessageTime(tag, to, n_bytes, start_s, time.perf_counter()))


class LocalChannel:
    """All peers in this process, one mailbox each; a tensor passes by reference."""

    def __init__(self, name: str, mailboxes: dict[str, Mailbox]) -> None:
        self.sent_bytes = 0
        self._mailboxes = mailboxes
        self._mine = mailboxes.setdefault(name, Mailbox())

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> None:
        """See Channel."""
        if tensor is not None:
            self.sent_bytes += tensor.numel() * tensor.element_size()
        self._mailboxes.setdefault(peer, Mailbox()).put(tag, tensor)

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """See Channel."""
        return self._mine.take(tag, timeout_s)

    def close(self) -> None:
        """See Channel."""


# Header: magic, kind, dtype (255: no tensor), dimensions, length of the name, index, bytes of payload; then the
# dimensions as int64, the name as UTF-8, the payload as it lies in memory (row-major).
_HEADER = struct.Struct("<4sBBBBqQ")
_MAGIC = b"nsr1"
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
_NO_TENSOR = 255
_SEND_BUFFER_BYTES = 4 << 20
_DEAD_PEER_MS = 20_000


class SocketChannel:
    """Persistent TCP connections to the peers, authenticated by a token that only this pipeline's actors know.

    One writer thread per peer, one reader thread per incoming connection; payloads are received straight into the
    tensor they become.  A connection that breaks fails every receive, with the peer's name.
    """

    def __init__(self, name: str, token: str, host: str = "127.0.0.1") -> None:
        self.name = name
        self.sent_bytes = 0
        self.mailbox = Mailbox()
        self._token = token.encode()
        self._closing = False
        self._writers: dict[str, _Writer] = {}
        self._accepted: list[socket.socket] = []
        self._server = socket.create_server((host, 0))
        self.address = Address(host, self._server.getsockname()[1])
        threading.Thread(target=self._accept, name=f"channel-{name}-accept", daemon=True).start()

    @staticmethod
    def new_token() -> str:
        """A secret for the channels of one pipeline."""
        return secrets.token_hex(16)

    def connect(self, peers: dict[str, Address], timeout_s: float = 30.0) -> None:
        """Opens a connection to each peer; raises PeerLost naming the peer that can't be reached."""
        for peer, address in peers.items():
            try:
                sock = socket.create_connection((address.host, address.port), timeout_s)
            except OSError as e:
                raise PeerLost(
                    f"channel: {self.name} can't reach {peer} at {address.host}:{address.port}: {e}"
                ) from None
            sock.settimeout(None)
            _tune(sock)
            hello = self.name.encode()
            sock.sendall(self._token + struct.pack("<H", len(hello)) + hello)
            self._writers[peer] = _Writer(sock, f"{self.name}->{peer}", self._lost(peer))

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> None:
        """See Channel."""
        if peer == self.name:
            self.mailbox.put(tag, tensor)
            return
        header, payload = _encode(tag, tensor)
        self.sent_bytes += len(header) + (payload.nbytes if payload is not None else 0)
        self._writers[peer].put(header, payload)

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """See Channel."""
        return self.mailbox.take(tag, timeout_s)

    def close(self) -> None:
        """See Channel."""
        self._closing = True
        for writer in self._writers.values():
            writer.close()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for sock in self._accepted:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.mailbox.fail(PeerLost(f"channel: {self.name} was closed"))

    def _lost(self, peer: str) -> Callable[[Exception], None]:
        def report(error: Exception) -> None:
            if not self._closing:
                self.mailbox.fail(PeerLost(f"channel: {self.name} lost {peer}: {error}"))

        return report

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            self._accepted.append(sock)
            threading.Thread(target=self._read, args=(sock,), name=f"channel-{self.name}-read", daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        peer = "a peer"
        try:
            _tune(sock)
            sock.settimeout(30)
            if not hmac.compare_digest(bytes(_read_exactly(sock, len(self._token))), self._token):
                sock.close()
                return
            (length,) = struct.unpack("<H", _read_exactly(sock, 2))
            peer = bytes(_read_exactly(sock, length)).decode()
            sock.settimeout(None)
            while True:
                tag, tensor = _read_message(sock)
                self.mailbox.put(tag, tensor)
        except (OSError, ConnectionError, ValueError) as e:
            self._lost(peer)(e)


class _Writer:
    """Sends one connection's messages in order, on its own thread."""

    def __init__(self, sock: socket.socket, name: str, on_error: Callable[[Exception], None]) -> None:
        self._sock, self._on_error = sock, on_error
        self._queue: queue.SimpleQueue[tuple[bytes, memoryview | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"channel-{name}", daemon=True)
        self._thread.start()

    def put(self, header: bytes, payload: memoryview | None) -> None:
        self._queue.put((header, payload))

    def close(self, timeout_s: float = 5.0) -> None:
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._sock.close()

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                header, payload = item
                if payload is None or not payload.nbytes:
                    self._sock.sendall(header)
                elif payload.nbytes <= 1 << 16:
                    self._sock.sendall(header + payload)
                else:
                    self._sock.sendall(header)
                    self._sock.sendall(payload)
        except OSError as e:
            self._on_error(e)


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_PEER_MS)


def _encode(tag: Tag, tensor: torch.Tensor | None) -> tuple[bytes, memoryview | None]:
    name = tag.name.encode()
    if len(name) > 255:
        raise ValueError(f"channel: the name of a value has at most 255 bytes, got {len(name)}")
    if tensor is None:
        return _HEADER.pack(_MAGIC, tag.kind, _NO_TENSOR, 0, len(name), tag.index, 0) + name, None
    flat = tensor.detach().to("cpu").contiguous()
    payload = memoryview(flat.reshape(-1).view(torch.uint8).numpy()) if flat.numel() else None
    head = _HEADER.pack(
        _MAGIC, tag.kind, _DTYPES.index(flat.dtype), flat.dim(), len(name), tag.index, payload.nbytes if payload else 0
    )
    return head + struct.pack(f"<{flat.dim()}q", *flat.shape) + name, payload


def _read_message(sock: socket.socket) -> tuple[Tag, torch.Tensor | None]:
    magic, kind, dtype, dims, name_length, index, n_bytes = _HEADER.unpack(_read_exactly(sock, _HEADER.size))
    if magic != _MAGIC:
        raise ValueError("not a nesa_ray message")
    rest = _read_exactly(sock, 8 * dims + name_length)
    shape = struct.unpack_from(f"<{dims}q", rest)
    tag = Tag(Kind(kind), bytes(rest[8 * dims :]).decode(), index)
    if dtype == _NO_TENSOR:
        return tag, None
    tensor = torch.empty(shape, dtype=_DTYPES[dtype])
    if tensor.numel() * tensor.element_size() != n_bytes:
        raise ValueError(f"{tag}: the header says {n_bytes} bytes for shape {shape}")
    if n_bytes:
        _read_into(sock, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return tag, tensor


def _read_exactly(sock: socket.socket, n_bytes: int) -> bytearray:
    buffer = bytearray(n_bytes)
    _read_into(sock, memoryview(buffer))
    return buffer


def _read_into(sock: socket.socket, view: Any) -> None:
    while view.nbytes:
        got = sock.recv_into(view)
        if not got:
            raise ConnectionError("the connection was closed")
        view = view[got:]
