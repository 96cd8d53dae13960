"""The sending end of a TCP connection between two peers: encoding, coalescing, and how long a silence is a death."""

from __future__ import annotations

import functools
import queue
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nesa_ray.cluster.topology import Link
from nesa_ray.runtime.emulated_link import EmulatedLink
from nesa_ray.runtime.link_codec import Encoder
from nesa_ray.runtime.message import RAW, Sent, Tag, header, raw_payload

FLUSH_S = 5.0
# Small messages to one peer become one write, up to so many bytes and buffers (two a message; Linux takes 1024).
_COALESCED_BYTES = 1 << 16
_COALESCED_BUFFERS = 512
_SEND_BUFFER_BYTES = 4 << 20
# A little more than the link was measured to do, for it may have been measured low.
_PACED = 1.03
_PACED_BELOW_BYTES_PER_S = 125e6  # faster links fill no queues with what a micro-batch sends, and pacing takes time
_SO_MAX_PACING_RATE = 47  # asm-generic/socket.h; Python doesn't name it
# A peer is dead after so long without an answer, to what was sent or to the probes of an idle connection.  A link that
# stalls for 10 s isn't: TCP sends again after pauses that double, so at the latest some 20 s after the stall began.
_DEAD_PEER_S = 30
_PROBE_AFTER_S, _PROBE_EVERY_S = 10, 5


@dataclass(slots=True)
class Message:
    """A tensor on its way, to be encoded.  `computed`: what a GPU has to have done before it is what it should be."""

    tag: Tag
    tensor: torch.Tensor | None
    encoder: Encoder
    codec: str
    sent: Sent
    computed: torch.cuda.Event | None

    @property
    def at_once(self) -> bool:
        """Whether it is soon written: small, and as it lies in memory."""
        if self.tensor is None:
            return True
        return self.codec == RAW and self.tensor.nbytes <= _COALESCED_BYTES and self.tensor.is_cpu

    def encoded(self, peer: str) -> tuple[bytes, memoryview]:
        """Header and payload; notes the size in `sent`."""
        if self.tensor is None:
            self.sent.wire_bytes = 0
            return header(self.tag, None, RAW, 0), memoryview(b"")
        if self.computed is not None:
            self.computed.synchronize()
        encoded = self.encoder.encode(self.codec, peer, self.tag, self.tensor)
        payload = raw_payload(self.tensor) if encoded is None else encoded.data
        self.sent.wire_bytes = payload.nbytes
        return header(self.tag, self.tensor, RAW if encoded is None else self.codec, payload.nbytes), payload


class Writer:
    """Encodes and sends one connection's messages in order, on its own thread, through an emulated link if it has one.

    A small message that needs no encoding, while none waits, is written by who sends it, which saves the turn of a
    thread.  What is queued when the connection is free goes in one write, as long as it is small.
    """

    def __init__(
        self, sock: socket.socket, name: str, peer: str, on_error: Callable[[Exception], None], link: Link | None
    ) -> None:
        self.sent_bytes = self.raw_bytes = 0
        self._sock, self._peer, self._on_error = sock, peer, on_error
        self._link = EmulatedLink(link, f"{name}->{peer}") if link is not None else None
        self._queue: queue.SimpleQueue[Message | list[memoryview] | None] = queue.SimpleQueue()
        self._lock, self._queued = threading.Lock(), 0  # over the count: of what the thread hasn't written
        self._thread = threading.Thread(target=self._run, name=f"channel-{name}->{peer}", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Sends or queues it."""
        queued: Message | list[memoryview] = message
        with self._lock:
            if not self._queued and self._link is None and message.at_once:
                left = self._write(self._encoded(message), socket.MSG_DONTWAIT)
                if not left:
                    return
                queued = left
            self._queued += 1
            self._queue.put(queued)

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Waits until what is queued is sent, but no longer than that, and closes the connection."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._link is not None:
            self._link.close(timeout_s)
        self._sock.close()

    def _run(self) -> None:
        try:
            while self._send_waiting():
                pass
        except Exception as e:  # of encoding: nobody else would hear of it
            self._on_error(e)

    def _send_waiting(self) -> bool:
        """Waits for a message and sends it, with those behind it while they are small; False after the last."""
        buffers: list[memoryview] = []
        taken, n_bytes, message = 0, 0, self._queue.get()
        while message is not None:
            taken += 1
            parts = self._encoded(message) if isinstance(message, Message) else message
            size = sum(p.nbytes for p in parts)
            if self._link is not None:
                self._link.put(size, partial(self._write, parts))
            else:
                buffers += parts
                n_bytes += size
            if n_bytes >= _COALESCED_BYTES or len(buffers) >= _COALESCED_BUFFERS:
                break
            try:
                message = self._queue.get_nowait()
            except queue.Empty:
                break
        self._write(buffers)
        with self._lock:
            self._queued -= taken
        return message is not None

    def _encoded(self, message: Message) -> list[memoryview]:
        """What is to be written for it."""
        head, payload = message.encoded(self._peer)
        self.sent_bytes += len(head) + payload.nbytes
        self.raw_bytes += len(head) + (0 if message.tensor is None else message.tensor.nbytes)
        return [memoryview(head), payload]

    def _write(self, buffers: Sequence[memoryview], flags: int = 0) -> list[memoryview]:
        """Writes them; what is left where, by the flags, it doesn't wait."""
        left = [b for b in buffers if b.nbytes]
        try:
            while left:
                sent = self._sock.sendmsg(left, (), flags)
                while left and sent >= left[0].nbytes:
                    sent -= left.pop(0).nbytes
                if sent:
                    left[0] = left[0][sent:]
        except BlockingIOError:
            return left
        except OSError as e:
            self._on_error(e)
        return []


def tune(sock: socket.socket) -> None:
    """Sets what is above, and a send buffer of 4 MiB where a process may have that.

    Elsewhere (Linux's own limit is 208 KiB) the kernel's is better: it grows to the link's bandwidth-delay product.
    """
    if _may_have_send_buffer():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_USER_TIMEOUT": 1000 * _DEAD_PEER_S,
        "TCP_KEEPIDLE": _PROBE_AFTER_S,
        "TCP_KEEPINTVL": _PROBE_EVERY_S,
        "TCP_KEEPCNT": (_DEAD_PEER_S - _PROBE_AFTER_S) // _PROBE_EVERY_S,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def pace(sock: socket.socket, link: Link) -> None:
    """Sends no faster than the link can: Linux spaces the packets out, others' TCP does as it likes.

    What goes faster only waits in a queue on the way, and what that can't hold is lost: BBR, which never has enough of
    a micro-batch to learn the link's speed by, sends at almost three times of it, and CUBIC until it loses something.
    """
    bytes_per_s = _PACED * link.bytes_per_s
    if sys.platform == "linux" and bytes_per_s < _PACED_BELOW_BYTES_PER_S:
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, int(bytes_per_s))


@functools.cache
def _may_have_send_buffer() -> bool:
    try:
        return int(Path("/proc/sys/net/core/wmem_max").read_text()) >= _SEND_BUFFER_BYTES
    except (OSError, ValueError):
        return False
