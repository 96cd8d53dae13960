"""What probe() measures on one device and on one link.  No Ray here, and torch only inside the functions.

A device: fp32 matrix products and large copies, for a fixed time.  All devices of the cluster run at the same time, so
that those that share cores (or memory channels) show the share they really get; each runs a while before and after
its own window, so that the others' starts and ends don't show.
A link: round trips of a few bytes, then one way and the other transfers that grow with the speed of those before, until
one lasts several round trips.  Its speed is what arrives while it is steady, by the acknowledgements that the sender
gets: neither TCP's slow start nor the latency nor what waits in a queue counts.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial

from nesa_ray.cluster.topology import Device, Link

_PING, _UPLOAD, _DOWNLOAD = b"p", b"u", b"d"
_REQUEST = struct.Struct("<cQQ")  # kind, bytes, window
_SECRET_BYTES = 16
_CHUNK_BYTES = 1 << 20
_PINGS = 100
_FIRST_BYTES, _MOST_BYTES = 12_000, 1 << 30  # the first is what TCP sends at once on a new connection
_GROWTH = 8  # a transfer is at most so many times the one before, whose speed may have been a burst's
_STEADY_TRIPS = 8  # a transfer of so many round trips,
_STEADY_S = 0.2  # and of so many seconds, tells the link's speed
_WINDOW = 3  # what is under way at most: enough to fill the link so many times, as it seemed; more overruns queues
_LEAST_WINDOW = 1 << 16
_POLL_S = 1e-3


def flops_meter(where: str, window_s: float) -> Callable[[float], float]:
    """Gets ready to measure a torch device, "cpu" as this process is pinned, or "cuda:0".

    What it returns takes a window's seconds and twice as long, and gives fp32 flops per second in matrix products.
    A device with less of a core than another is slower to get ready too: only when all are, they are measured at the
    same time.
    """
    import torch

    from nesa_ray.products import product

    size = _matmul_size(where, window_s)
    a, b = (torch.rand(size, size, device=where) for _ in range(2))
    return lambda seconds: 2 * size**3 * _rate(lambda: product(a, b), where, seconds)


def memory_meter(where: str) -> Callable[[float], float]:
    """As flops_meter, for bytes per second read and written by large copies."""
    import torch

    copied_bytes = (32 << 20) if where == "cpu" else (256 << 20)
    source, target = (torch.ones(copied_bytes // 4, device=where) for _ in range(2))
    return lambda seconds: 2 * copied_bytes * _rate(lambda: target.copy_(source), where, seconds)


def free_memory(where: str) -> float:
    """Free bytes of a GPU."""
    import torch

    return float(torch.cuda.mem_get_info(where)[0])


def level(speeds: Sequence[float], devices: Sequence[Device], most: float = 1.25) -> list[float]:
    """The devices' speeds without what is noise: alike ones get their mean if they lie within a factor of `most`.

    Alike are as many cores of one host with the same niceness.  They are as fast as each other unless something else
    runs there, which takes more than that; a plan that believed in less would put more on one of two for nothing.
    """
    alike: dict[Hashable, list[float]] = {}
    groups = [(d.node, d.kind, len(d.cores), d.niceness) for d in devices]
    for speed, group in zip(speeds, groups, strict=True):
        alike.setdefault(group, []).append(speed)
    means = {g: sum(of) / len(of) if max(of) <= most * min(of) else None for g, of in alike.items()}
    return [means[g] or speed for speed, g in zip(speeds, groups, strict=True)]


def _rate(step: Callable[[], object], where: str, window_s: float) -> float:
    """Steps per second within the middle window of about 2 * window_s of stepping.

    The window is opened and closed between steps and lasts as long as it did, so a slow step is counted whole.
    """
    import torch

    finish: Callable[[], object] = (lambda: None) if where == "cpu" else torch.cuda.synchronize
    with torch.inference_mode():
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
                    kind, n_bytes, window = _REQUEST.unpack(_receive(connection, _REQUEST.size))
                    if kind == _DOWNLOAD:
                        connection.sendall(struct.pack("<d", _push(connection, n_bytes, window, buffer)))
                    else:
                        _pull(connection, n_bytes, buffer)
            except (OSError, EOFError):
                return


def measure_link(address: tuple[str, int, bytes], max_seconds: float) -> Link:
    """The link to a LinkServer: half the round trip that one in four is within, and the slower direction's speed.

    A steady link of a short round trip takes a fraction of max_seconds; no link takes much more, unless four transfers
    of 12 KB do.  Raises OSError when the server isn't reachable, EOFError when it goes away.
    """
    ip, port, secret = address
    buffer = bytearray(_CHUNK_BYTES)
    start = time.monotonic()
    with socket.create_connection((ip, port), max(1.0, max_seconds)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(max(10.0, 10 * max_seconds))
        connection.sendall(secret)
        trips: list[float] = []
        while len(trips) < _PINGS and (len(trips) < 3 or time.monotonic() - start < max_seconds / 10):
            trips.append(_transfer(connection, buffer, _PING, 0, 0)[1])
        trip_s = sorted(trips)[len(trips) // 4]  # the others met what else runs here and there
        half_s = (start + max_seconds - time.monotonic()) / 2
        up, down = (
            _bandwidth(partial(_transfer, connection, buffer, kind), trip_s, time.monotonic() + half_s)
            for kind in (_UPLOAD, _DOWNLOAD)
        )
    return Link(min(up, down), trip_s / 2)


def _bandwidth(transfer: Callable[[int, int], tuple[float, float]], trip_s: float, end: float) -> float:
    """The speed of the fastest of the transfers that lasted, or of the last one; in bytes per second.

    `transfer` of some bytes, so many of them under way at most, tells its speed and its seconds.  Ends when one of
    _STEADY_TRIPS round trips was as fast as the one before, within a tenth, or three have lasted, or the next might end
    after `end`; but not after the first, which this machine may have been too busy for.
    """
    steady_s = max(_STEADY_S, _STEADY_TRIPS * trip_s)
    n_bytes, window, before = _FIRST_BYTES, _LEAST_WINDOW, 0.0
    lasting: list[float] = []
    while True:
        speed, seconds = transfer(n_bytes, window)
        if lasted := seconds > steady_s:
            lasting.append(speed)
        if (lasted and abs(speed - before) < 0.1 * speed) or len(lasting) == 3:
            return max(lasting)
        left = end - time.monotonic()
        grown = max(1.3 * steady_s * speed, n_bytes if lasted else 2 * n_bytes)
        # Twice the bytes take at most twice the time, and less while TCP's window still opens.
        fits = max(speed * (left - trip_s), n_bytes * left / seconds)
        grown = min(grown, _GROWTH * n_bytes, _MOST_BYTES, fits)
        if grown < n_bytes and before:
            return max([*lasting, speed])
        filled = speed * (trip_s + 5 * _POLL_S)
        if speed > 1.5 * before:  # it was the window that held it back
            filled = max(filled, min(n_bytes, window))
        n_bytes, before, window = max(n_bytes, int(grown)), speed, max(_LEAST_WINDOW, int(_WINDOW * filled))


def _transfer(
    connection: socket.socket, buffer: bytearray, kind: bytes, n_bytes: int, window: int
) -> tuple[float, float]:
    """The bytes per second that arrived, and the seconds from the request to the answer."""
    start, speed = time.monotonic(), 0.0
    connection.sendall(_REQUEST.pack(kind, n_bytes, window))
    if kind == _UPLOAD:
        speed = _push(connection, n_bytes, window, buffer)
    elif kind == _DOWNLOAD:
        _pull(connection, n_bytes, buffer)
        (speed,) = struct.unpack("<d", _receive(connection, 8))
    else:
        _receive(connection, 1)
    seconds = time.monotonic() - start
    return speed or n_bytes / seconds, seconds


def _push(connection: socket.socket, n_bytes: int, window: int, buffer: bytearray) -> float:
    """Sends n_bytes, `window` of them under way at most, and takes the answer; returns the _steady_speed."""
    view, sent = memoryview(buffer), 0
    before = _arrived(connection)
    samples = [(0, time.monotonic())]
    while sent < n_bytes or not select.select([connection], [], [], _POLL_S)[0]:
        room = min(n_bytes, samples[-1][0] + window) - sent
        if room > 0:
            sent += connection.send(view[: min(room, len(buffer))])
        elif sent < n_bytes:
            time.sleep(_POLL_S)
        samples.append((_arrived(connection) - before, time.monotonic()))
    _receive(connection, 1)
    return _steady_speed([*samples, (n_bytes, time.monotonic())])


def _steady_speed(samples: Sequence[tuple[int, float]]) -> float:
    """The most bytes per second at which a third of a transfer arrived; 0 if all came at once.

    The first quarter isn't looked at, where TCP's window opens, nor the last tenth, where what was lost comes again on
    a link with nothing else to do.  The best third, as a machine with other things to do leaves its link idle at times.
    `samples` are bytes that have arrived and when, in order.
    """
    n_bytes = samples[-1][0]
    best, end = 0.0, 0
    for arrived, at in samples:
        while end < len(samples) and samples[end][0] < arrived + n_bytes / 3:
            end += 1
        if end == len(samples) or (best and samples[end][0] > 0.9 * n_bytes):
            break
        if arrived >= n_bytes / 4:
            best = max(best, (samples[end][0] - arrived) / (samples[end][1] - at))
    return best


def _arrived(connection: socket.socket) -> int:
    """The bytes that the peer says it has (struct tcp_info of Linux), those behind a lost packet included; else 0."""
    if not hasattr(socket, "TCP_INFO"):
        return 0
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    if len(information) < 128:
        return 0
    (packet_bytes,), (behind_a_gap,) = (
        struct.unpack_from("=I", information, 16),
        struct.unpack_from("=I", information, 28),
    )
    (in_order,) = struct.unpack_from("=Q", information, 120)
    return int(in_order + packet_bytes * behind_a_gap)


def _pull(connection: socket.socket, n_bytes: int, buffer: bytearray) -> None:
    """Receives n_bytes, forgets them and answers; raises EOFError when the peer is gone."""
    view = memoryview(buffer)
    while n_bytes:
        got = connection.recv_into(view, min(n_bytes, len(buffer)))
        if not got:
            raise EOFError("the peer closed the connection")
        n_bytes -= got
    connection.sendall(b"!")


def _receive(connection: socket.socket, n_bytes: int) -> bytes:
    """Exactly n_bytes, few; raises EOFError when the peer is gone."""
    received = b""
    while len(received) < n_bytes:
        part = connection.recv(n_bytes - len(received))
        if not part:
            raise EOFError("the peer closed the connection")
        received += part
    return received
