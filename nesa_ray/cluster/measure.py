"""What probe() measures on one device and on one link.  No Ray here, and torch only inside the functions.

A device: fp32 matrix products and large copies, for a fixed time.  All devices of the cluster run at the same time, so
that those that share cores (or memory channels) show the share they really get; each runs a while before and after
its own window, so that the others' starts and ends don't show.
A link: round trips of a few bytes, then transfers that double until one takes long enough to be told from latency.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable

from nesa_ray.cluster.topology import Link

_PING, _UPLOAD, _DOWNLOAD = b"p", b"u", b"d"
_SECRET_BYTES = 16
_CHUNK_BYTES = 1 << 20


def measure_flops(where: str, window_s: float) -> float:
    """fp32 flops per second of a torch device ("cpu" as this process is pinned, or "cuda:0") in matrix products.

    Takes 2 * window_s and the time of some products.
    """
    import torch

    from nesa_ray.products import product

    size = _matmul_size(where, window_s)
    a, b = (torch.rand(size, size, device=where) for _ in range(2))
    with torch.inference_mode():
        return 2 * size**3 * _rate(lambda: product(a, b), where, window_s)


def measure_memory(where: str, window_s: float) -> float:
    """Bytes per second read and written by large copies on a torch device.  Takes 2 * window_s."""
    import torch

    copied_bytes = (32 << 20) if where == "cpu" else (256 << 20)
    source, target = (torch.zeros(copied_bytes // 4, device=where) for _ in range(2))
    with torch.inference_mode():
        return 2 * copied_bytes * _rate(lambda: target.copy_(source), where, window_s)


def free_memory(where: str) -> float:
    """Free bytes of a GPU."""
    import torch

    return float(torch.cuda.mem_get_info(where)[0])


def _rate(step: Callable[[], object], where: str, window_s: float) -> float:
    """Steps per second within the middle window of about 2 * window_s of stepping.

    The window is opened and closed between steps and lasts as long as it did, so a slow step is counted whole.
    """
    import torch

    finish: Callable[[], object] = (lambda: None) if where == "cpu" else torch.cuda.synchronize
    step()
    finish()
    start = time.monotonic()
    opened = closed = 0.0
    steps = 0
    while (now := time.monotonic()) < start + 2 * window_s or not closed:
        if not opened and now >= start + window_s / 2:
            opened = now
        elif opened and not closed and now >= opened + window_s:
            closed = now
        steps += bool(opened and not closed)
        step()
        finish()
    return steps / (closed - opened)


def _matmul_size(where: str, window_s: float) -> int:
    """The size, up to 4096, whose product takes at least 2 ms, and no more than a tenth of the window."""
    import torch

    from nesa_ray.products import product

    size = 256
    while size < 4096:
        a = torch.rand(size, size, device=where)
        product(a, a)
        start = time.monotonic()
        product(a, a).sum().item()
        if (seconds := time.monotonic() - start) > 2e-3 or seconds * 8 > window_s / 10:
            break
        size *= 2
    return size


class LinkServer:
    """Answers measure_link on one address until closed.  Serves only who knows its secret."""

    def __init__(self, ip: str) -> None:
        self._listener = socket.create_server((ip, 0))
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self.address: tuple[str, int, bytes] = (*self._listener.getsockname()[:2], self._secret)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        buffer = bytearray(_CHUNK_BYTES)
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(60.0)
            try:
                if not hmac.compare_digest(_receive(connection, _SECRET_BYTES), self._secret):
                    return
                while True:
                    kind, n_bytes = struct.unpack("<cQ", _receive(connection, 9))
                    if kind == _UPLOAD:
                        _drain(connection, n_bytes, buffer)
                    elif kind == _DOWNLOAD:
                        _send(connection, n_bytes, buffer)
                    connection.sendall(b"!")
            except (OSError, EOFError):
                return


def measure_link(address: tuple[str, int, bytes], max_seconds: float) -> Link:
    """The link to a LinkServer: half the median round trip, and the slower direction's speed.

    Takes about max_seconds at most, unless a single transfer of 64 KB does.  Raises OSError when the server isn't
    reachable, EOFError when it goes away.
    """
    ip, port, secret = address
    buffer = bytearray(_CHUNK_BYTES)
    with socket.create_connection((ip, port), max(1.0, max_seconds)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(max(10.0, 10 * max_seconds))
        connection.sendall(secret)
        trips: list[float] = []
        start = time.monotonic()
        while len(trips) < 300 and (len(trips) < 3 or time.monotonic() - start < max_seconds / 4):
            trips.append(_transfer(connection, _PING, 0, buffer))
        trip_s = statistics.median(trips)
        speeds = [
            _bandwidth(lambda n, kind=kind: _transfer(connection, kind, n, buffer), trip_s, 3 / 8 * max_seconds)  # type: ignore[misc]
            for kind in (_UPLOAD, _DOWNLOAD)
        ]
    return Link(min(speeds), trip_s / 2)


def _bandwidth(transfer: Callable[[int], float], trip_s: float, max_seconds: float) -> float:
    """Bytes per second of the largest transfer that fits the time; the fastest of two where there is time for two."""
    end = time.monotonic() + max_seconds
    n_bytes, best = 1 << 16, 0.0
    while True:
        seconds = transfer(n_bytes)
        # A transfer that doesn't outlast a round trip clearly says nothing about bandwidth yet.
        best = max(best if seconds > 4 * trip_s else 0.0, n_bytes / max(seconds - trip_s, seconds / 10))
        if time.monotonic() + 2 * seconds > end or n_bytes >= 1 << 30:
            return best
        if seconds < max_seconds / 8:
            n_bytes *= 2


def _transfer(connection: socket.socket, kind: bytes, n_bytes: int, buffer: bytearray) -> float:
    start = time.monotonic()
    connection.sendall(struct.pack("<cQ", kind, n_bytes))
    if kind == _UPLOAD:
        _send(connection, n_bytes, buffer)
    elif kind == _DOWNLOAD:
        _drain(connection, n_bytes, buffer)
    _receive(connection, 1)
    return time.monotonic() - start


def _send(connection: socket.socket, n_bytes: int, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while n_bytes:
        part = min(n_bytes, len(buffer))
        connection.sendall(view[:part])
        n_bytes -= part


def _receive(connection: socket.socket, n_bytes: int) -> bytes:
    """Exactly n_bytes, few; raises EOFError when the peer is gone."""
    received = b""
    while len(received) < n_bytes:
        part = connection.recv(n_bytes - len(received))
        if not part:
            raise EOFError("the peer closed the connection")
        received += part
    return received


def _drain(connection: socket.socket, n_bytes: int, buffer: bytearray) -> None:
    """Receives exactly n_bytes, many, and forgets them; raises EOFError when the peer is gone."""
    view = memoryview(buffer)
    while n_bytes:
        got = connection.recv_into(view, min(n_bytes, len(buffer)))
        if not got:
            raise EOFError("the peer closed the connection")
        n_bytes -= got
