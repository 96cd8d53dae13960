"""Channel: how tensors go from stage to stage, actor to actor; never through Ray.

A receiver names what it waits for by a Tag; messages arrive in any order.  Sending never blocks the caller, so a
schedule can't deadlock on buffers.  Two implementations: `LocalChannel` (several stages in one process) and
`SocketChannel` (one persistent TCP connection per pair of peers and direction; message.py).  Activations and their
gradients are encoded as the link to their peer asks for (link_codec.py), all else goes as it is.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

import torch

from nesa_ray.cluster.topology import Link
from nesa_ray.errors import PeerLost, Timeout
from nesa_ray.runtime.connection import FLUSH_S, Message, Writer, pace, tune
from nesa_ray.runtime.emulated_link import EmulatedLink
from nesa_ray.runtime.link_codec import Encoder, LinkCodec, decoded
from nesa_ray.runtime.message import Kind, Sent, Tag, check, read_exactly, read_message

__all__ = [
    "Address", "Channel", "Kind", "LocalChannel", "Mailbox", "MessageTime", "RecordingChannel", "Sent",
    "SocketChannel", "Tag",
]  # fmt: skip
T = TypeVar("T")
_Wait: TypeAlias = "queue.SimpleQueue[torch.Tensor | Exception | None]"  # where what is waited for is put


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens."""

    host: str
    port: int


class Channel(Protocol):
    """Sends to peers by their name; receives by tag."""

    @property
    def sent_bytes(self) -> int:
        """Bytes sent so far: encoded, and put on the wire."""

    @property
    def raw_bytes(self) -> int:
        """What these would have been without codecs."""

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> Sent:
        """Queues the tensor (None: "there is none") and returns at once.  The tensor must not change afterwards."""

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """Waits for the message and removes it; raises Timeout or PeerLost."""

    def has(self, tag: Tag) -> bool:
        """Whether the message is there."""

    def close(self) -> None:
        """Flushes what is queued and frees threads and sockets."""


class Mailbox:
    """Messages that have arrived, by tag.  Thread-safe.

    A message is handed to who waits for it; no other thread wakes, for a stage's next kernels wait for this one.
    """

    def __init__(self) -> None:
        self._arrived: dict[Tag, deque[torch.Tensor | None]] = {}
        self._waiting: dict[Tag, deque[_Wait]] = {}
        self._lock = threading.Lock()  # over both, and the failure
        self._failure: Exception | None = None
        self.on_message: Callable[[Tag, torch.Tensor | None], bool] | None = None

    def put(self, tag: Tag, tensor: torch.Tensor | None) -> None:
        """Delivers; a handler set as `on_message` that answers True takes the message instead."""
        if self.on_message is not None and self.on_message(tag, tensor):
            return
        with self._lock:
            if tag in self._waiting:
                _first(self._waiting, tag).put(tensor)
            else:
                self._arrived.setdefault(tag, deque()).append(tensor)

    def has(self, tag: Tag) -> bool:
        """Whether a message of that tag waits here."""
        return tag in self._arrived

    def fail(self, error: Exception) -> None:
        """Makes every present and future wait raise `error`."""
        with self._lock:
            self._failure = self._failure or error
            while self._waiting:
                _first(self._waiting, next(iter(self._waiting))).put(self._failure)

    def take(self, tag: Tag, timeout_s: float | None) -> torch.Tensor | None:
        """Waits for `tag`; raises Timeout, or the failure that was reported."""
        with self._lock:
            if tag in self._arrived:
                return _first(self._arrived, tag)
            if self._failure is not None:
                raise self._failure
            wait: _Wait = queue.SimpleQueue()
            self._waiting.setdefault(tag, deque()).append(wait)
        try:
            got = wait.get(timeout=None if timeout_s is None else max(0.0, timeout_s))
        except BaseException as e:  # out of time, or interrupted
            with self._lock:
                if in_vain := wait.empty():
                    self._waiting[tag].remove(wait)
                    if not self._waiting[tag]:
                        del self._waiting[tag]
            if not isinstance(e, queue.Empty):
                raise
            if in_vain:
                raise Timeout(f"channel: {tag} didn't arrive within {timeout_s} s") from None
            got = wait.get()  # it has come just now
        if isinstance(got, Exception):
            raise got
        return got


def _first(of: dict[Tag, deque[T]], tag: Tag) -> T:
    """The first of that tag, taken out."""
    several = of[tag]
    first = several.popleft()
    if not several:
        del of[tag]
    return first


@dataclass(frozen=True, slots=True)
class MessageTime:
    """When a message was handed to the channel, for the peer `to`, or waited for (`to` is None): time.perf_counter.

    n_bytes     of the tensor
    wire_bytes  of what was sent for it; None where it was received, or when it isn't encoded yet
    """

    tag: Tag
    to: str | None
    n_bytes: int
    start_s: float
    end_s: float
    wire_bytes: int | None = None


class RecordingChannel:
    """A channel that notes when each message is sent and waited for; `clear` forgets the notes."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._noted: list[tuple[MessageTime, Sent]] = []

    @property
    def messages(self) -> list[MessageTime]:
        """The notes, in order."""
        return [replace(note, wire_bytes=sent.wire_bytes) for note, sent in self._noted]

    def clear(self) -> None:
        """Forgets the notes."""
        self._noted.clear()

    @property
    def sent_bytes(self) -> int:
        """See Channel."""
        return self._channel.sent_bytes

    @property
    def raw_bytes(self) -> int:
        """See Channel."""
        return self._channel.raw_bytes

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> Sent:
        """See Channel."""
        start_s = time.perf_counter()
        sent = self._channel.send(peer, tag, tensor)
        self._note(tag, peer, tensor, start_s, sent)
        return sent

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """See Channel."""
        start_s = time.perf_counter()
        tensor = self._channel.recv(tag, timeout_s)
        self._note(tag, None, tensor, start_s, Sent())
        return tensor

    def has(self, tag: Tag) -> bool:
        """See Channel."""
        return self._channel.has(tag)

    def close(self) -> None:
        """See Channel."""
        self._channel.close()

    def _note(self, tag: Tag, to: str | None, tensor: torch.Tensor | None, start_s: float, sent: Sent) -> None:
        n_bytes = 0 if tensor is None else tensor.nbytes
        self._noted.append((MessageTime(tag, to, n_bytes, start_s, time.perf_counter()), sent))


class LocalChannel:
    """All peers in this process, one mailbox each; a tensor passes by reference, or through its link's codec.

    links  of the peers to whom messages take as long as such a link would; to the others none
    """

    def __init__(
        self,
        name: str,
        mailboxes: dict[str, Mailbox],
        encoder: Encoder | None = None,
        links: Mapping[str, Link] | None = None,
    ) -> None:
        self.sent_bytes = self.raw_bytes = 0
        self.encoder = encoder or Encoder()
        self._mailboxes = mailboxes
        self._mine = mailboxes.setdefault(name, Mailbox())
        self._links = {peer: EmulatedLink(link, f"{name}->{peer}") for peer, link in (links or {}).items()}

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> Sent:
        """See Channel."""
        received, n_bytes = self.encoder.through(peer, tag, tensor)
        self.sent_bytes += n_bytes
        self.raw_bytes += 0 if tensor is None else tensor.nbytes
        mailbox = self._mailboxes.setdefault(peer, Mailbox())
        if peer in self._links:
            self._links[peer].put(n_bytes, partial(mailbox.put, tag, received))
        else:
            mailbox.put(tag, received)
        return Sent(n_bytes)

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """See Channel."""
        return self._mine.take(tag, timeout_s)

    def has(self, tag: Tag) -> bool:
        """See Channel."""
        return self._mine.has(tag)

    def close(self) -> None:
        """See Channel."""
        for link in self._links.values():
            link.close(FLUSH_S)


_READ_BUFFER_BYTES = 1 << 16
_HELLO_S = 30  # in which who connects has to say who it is


class SocketChannel:
    """Persistent TCP connections to the peers, authenticated by a token that only this pipeline's actors know.

    One writer thread per peer, which encodes what it sends, one reader thread per incoming connection, which decodes;
    raw payloads are received straight into the tensor they become.  A connection that breaks fails every receive, with
    the peer's name.  Only a message to oneself, which has no connection, is encoded and decoded by who sends it.
    """

    def __init__(self, name: str, token: str, host: str = "127.0.0.1") -> None:
        self.name = name
        self.encoder = Encoder()
        self.mailbox = Mailbox()
        self._token = token.encode()
        self._closing = False
        self._writers: dict[str, Writer] = {}
        self._accepted: list[socket.socket] = []
        self._server = socket.create_server((host, 0))
        self.address = Address(host, self._server.getsockname()[1])
        threading.Thread(target=self._accept, name=f"channel-{name}-accept", daemon=True).start()

    @staticmethod
    def new_token() -> str:
        """A secret for the channels of one pipeline."""
        return secrets.token_hex(16)

    @property
    def sent_bytes(self) -> int:
        """See Channel; with headers, without what goes to oneself."""
        return sum(w.sent_bytes for w in self._writers.values())

    @property
    def raw_bytes(self) -> int:
        """See Channel."""
        return sum(w.raw_bytes for w in self._writers.values())

    def connect(
        self,
        peers: dict[str, Address],
        timeout_s: float = 30.0,
        *,
        links: Mapping[str, Link] | None = None,
        emulate: bool = False,
    ) -> None:
        """Opens a connection to each peer; raises PeerLost naming the peer that can't be reached.

        To the peers in `links` messages are sent no faster than the link can; with `emulate` they take as long as such
        a link would.
        """
        for peer, address in peers.items():
            try:
                sock = socket.create_connection((address.host, address.port), timeout_s)
            except OSError as e:
                raise PeerLost(
                    f"channel: {self.name} can't reach {peer} at {address.host}:{address.port}: {e}"
                ) from None
            sock.settimeout(None)
            tune(sock)
            hello = self.name.encode()
            sock.sendall(self._token + struct.pack("<H", len(hello)) + hello)
            link = (links or {}).get(peer)
            if link is not None and not emulate:
                pace(sock, link)
            emulated = link if emulate else None
            self._writers[peer] = Writer(sock, self.name, peer, partial(self._lost, peer), emulated)

    def encode_with(self, codecs: Mapping[str, LinkCodec]) -> Encoder:
        """Encodes messages to these peers so from now on.  The encoder's `on` switches to raw and back."""
        self.encoder = Encoder(codecs)
        return self.encoder

    def send(self, peer: str, tag: Tag, tensor: torch.Tensor | None) -> Sent:
        """See Channel.  Raises ValueError for a tensor or a name that can't be sent."""
        check(tag, tensor)
        if peer == self.name:
            received, n_bytes = self.encoder.through(peer, tag, tensor)
            self.mailbox.put(tag, received)
            return Sent(n_bytes)
        computed = None
        if tensor is not None and tensor.is_cuda:
            computed = torch.cuda.current_stream(tensor.device).record_event()
        sent, codec = Sent(), self.encoder.codec(peer, tag, tensor)
        self._writers[peer].put(Message(tag, tensor, self.encoder, codec, sent, computed))
        return sent

    def recv(self, tag: Tag, timeout_s: float | None = None) -> torch.Tensor | None:
        """See Channel."""
        return self.mailbox.take(tag, timeout_s)

    def has(self, tag: Tag) -> bool:
        """See Channel."""
        return self.mailbox.has(tag)

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

    def _lost(self, peer: str, error: Exception) -> None:
        if not self._closing:
            self.mailbox.fail(PeerLost(f"channel: {self.name} lost {peer}: {error}"))

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            self._accepted.append(sock)
            threading.Thread(target=self._read, args=(sock,), name=f"channel-{self.name}-read", daemon=True).start()

    def _read(self, sock: socket.socket) -> None:
        peer = ""
        try:
            tune(sock)
            # Not the socket's own file, which is Python and takes longer: that of its descriptor, which outlives it.
            with io.BufferedReader(io.FileIO(os.dup(sock.fileno())), _READ_BUFFER_BYTES) as file:
                _receive_within(sock, _HELLO_S)
                if not hmac.compare_digest(read_exactly(file, len(self._token)), self._token):
                    sock.close()
                    return
                (length,) = struct.unpack("<H", read_exactly(file, 2))
                peer = read_exactly(file, length).decode()
                _receive_within(sock, 0)
                while True:
                    tag, tensor = read_message(file, decoded)
                    self.mailbox.put(tag, tensor)
        except Exception as e:  # of decoding as well: nobody else would hear of it
            if peer:  # a stranger who goes away, or says nothing, is nobody's loss
                self._lost(peer, e)


def _receive_within(sock: socket.socket, seconds: int) -> None:
    """How long a read from the socket waits; 0: for ever."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
