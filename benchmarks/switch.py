"""The network of emulated hosts: a switch in user space that gives each directed pair delay, rate, loss and outages.

Run by EmulatedHosts as a process of its own (`switch.py CONTROL_FD SETTINGS`).  It starts the hosts, holds their TAP
devices, takes commands as JSON lines from whoever connects to the socket CONTROL_FD, and ends with its owner.

A packet waits for those before it, takes its length over the rate to be sent, then the latency to arrive.  Hosts hand
over up to 64 KB of a TCP stream as one frame, which counts as the packets that a wire would see, headers and all; one
whose link loses or reorders packets hands them over singly, so that each is lost by itself.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import namespaces

FRAMES_AT_ONCE = 16  # of one host, before another's turn
FRAME_BYTES = 70_000
VIRTIO_HEADER_BYTES = 10
MAC_PREFIX = b"\x02\x00\x00\x00\x00"
LEAST_QUEUE_BYTES = 1 << 16
QUEUE_S = 0.1


class Wire:
    """One direction of a link, in packets' times.

    bytes_per_s   of packets with their headers; 0 = unlimited
    latency_s     one way
    loss          part of the packets that is lost
    reordering    part that is held back by up to the latency, 5 ms at least, so that later ones overtake it
    queue_bytes   what waits for the rate; a packet beyond it is dropped.  By default QUEUE_S of the rate or twice the
                  round trip, whichever is more, and 64 KB at least
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance.random
        self.cut = False
        self.stalled_until = 0.0
        self._free = 0.0
        self.set()

    def set(
        self,
        bytes_per_s: float = 0.0,
        latency_s: float = 0.0,
        loss: float = 0.0,
        reordering: float = 0.0,
        queue_bytes: float | None = None,
    ) -> None:
        """Changes what the wire does to packets that come from now on."""
        self.latency_s, self.loss, self.reordering = latency_s, loss, reordering
        self._s_per_byte = 1 / bytes_per_s if bytes_per_s else 0.0
        if queue_bytes is None:
            queue_bytes = max(LEAST_QUEUE_BYTES, bytes_per_s * max(QUEUE_S, 4 * latency_s))
        self._queue_s = queue_bytes * self._s_per_byte
        self._free = 0.0

    @property
    def single_packets(self) -> bool:
        """Whether packets meet different fates."""
        return self.loss > 0 or self.reordering > 0

    def arrival(self, now: float, n_bytes: int) -> float:
        """When what comes now arrives; -1 if it never does."""
        if self.cut or (self.loss and self._chance() < self.loss):
            return -1.0
        start = max(now, self.stalled_until)
        if self._s_per_byte:
            if self._free > start:
                if self._free - start > self._queue_s:
                    return -1.0
                start = self._free
            start += n_bytes * self._s_per_byte
            self._free = start
        if self.reordering and self._chance() < self.reordering:
            start += self._chance() * max(self.latency_s, 5e-3)
        return start + self.latency_s


class Host:
    """A host as the switch sees it; tap is -1 while it is down."""

    def __init__(self, name: str, index: int, ip: str, cores: list[int]) -> None:
        self.name, self.index, self.ip, self.cores = name, index, ip, cores
        self.pid, self.ended, self.tap = 0, -1, -1
        self.wires: list[Wire] = []
        self.counts = {"sent": 0, "dropped": 0}

    @property
    def mac(self) -> bytes:
        """Ends with the index, by which frames find it."""
        return MAC_PREFIX + bytes([self.index])


class Switch:
    """Starts and ends hosts, and forwards their frames, all in one thread."""

    def __init__(self, control: socket.socket, settings: dict[str, Any]) -> None:
        chance = random.Random(settings["seed"])
        self._hosts = [Host(h["name"], i, h["ip"], h["cores"]) for i, h in enumerate(settings["hosts"])]
        self._by_name = {h.name: h for h in self._hosts}
        for h in self._hosts:
            h.wires = [Wire(chance) for _ in self._hosts]
        self._hosts_file, self._congestion_control = settings["directory"] + "/hosts", settings["congestion_control"]
        self._due: list[tuple[float, int, Wire, Host, bytes]] = []
        self._order = 0
        self._control, self._owner = control, os.getppid()
        self._frames: dict[int, Host] = {}  # by TAP
        self._readers: dict[int, Callable[[], None]] = {control.fileno(): self._accept, 0: self._owner_is_gone}
        self._waiting: dict[str, list[Callable[[dict[str, Any]], None]]] = {}
        self._ending = False

    def run(self) -> None:
        """Until the owner is gone or says so; no host outlives it."""
        try:
            while not self._ending and os.getppid() == self._owner:  # a fork of the owner may hold its pipe open
                timeout = min(1.0, max(0.0, self._due[0][0] - time.monotonic())) if self._due else 1.0
                for fd in select.select([*self._frames, *self._readers], [], [], timeout)[0]:
                    if (source := self._frames.get(fd)) is None:
                        self._readers[fd]()
                        break  # it may have closed the others
                    self._forward(source)
                    self._deliver()
                self._deliver()
        finally:
            for h in self._hosts:
                self._kill(h)
            for h in self._hosts:
                if h.pid:
                    os.waitpid(h.pid, 0)

    def _deliver(self) -> None:
        """Hands over what has arrived by now."""
        due, now = self._due, time.monotonic()
        while due and due[0][0] <= now:
            _, order, wire, host, frame = heapq.heappop(due)
            if wire.stalled_until > now:
                heapq.heappush(due, (wire.stalled_until, order, wire, host, frame))
            elif wire.cut:
                host.counts["dropped"] += 1
            elif host.tap >= 0:
                with contextlib.suppress(OSError):  # the host has just died
                    os.write(host.tap, frame)

    def _forward(self, source: Host) -> None:
        """Takes frames from a host and works out when they arrive."""
        hosts, tap = self._hosts, source.tap
        for _ in range(FRAMES_AT_ONCE):
            try:
                frame = os.read(tap, FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the host has just died, as its pidfd will say
                self._frames.pop(tap, None)
                return
            mac = frame[VIRTIO_HEADER_BYTES : VIRTIO_HEADER_BYTES + 6]
            if mac[:5] == MAC_PREFIX:
                targets = hosts[mac[5] : mac[5] + 1]
            elif mac[0] & 1:
                targets = [h for h in hosts if h is not source]
            else:
                continue
            n_bytes, now = _wire_bytes(frame), time.monotonic()
            for target in targets:
                wire = source.wires[target.index]
                at = wire.arrival(now, n_bytes)
                if at < 0:
                    source.counts["dropped"] += 1
                    continue
                source.counts["sent"] += n_bytes
                self._order += 1
                heapq.heappush(self._due, (at, self._order, wire, target, frame))

    def _owner_is_gone(self) -> None:
        if not os.read(0, 1):
            self._ending = True

    def _accept(self) -> None:
        client, _ = self._control.accept()
        pending = b""

        def answer(what: dict[str, Any]) -> None:
            with contextlib.suppress(OSError):
                client.sendall(json.dumps(what).encode() + b"\n")

        def read() -> None:
            nonlocal pending
            try:
                chunk = client.recv(1 << 16)
            except OSError:
                chunk = b""
            if not chunk:
                del self._readers[client.fileno()]
                client.close()
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                try:
                    self._command(json.loads(line), answer)
                except (OSError, ValueError, KeyError, TypeError) as e:
                    answer({"error": f"{type(e).__name__}: {e}"})

        self._readers[client.fileno()] = read

    def _command(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Does what is asked; "start" and "kill" are answered once the host is up, or gone."""
        do = request.pop("do")
        if do == "status":
            up = {h.name: {"ip": h.ip, "pid": h.pid if h.tap >= 0 else 0, **h.counts} for h in self._hosts}
            return answer({"hosts": up})
        if do in ("start", "kill"):
            host = self._host(request.pop("host"))
            if (do == "start") == (host.pid == 0):
                self._waiting.setdefault(host.name, []).append(answer)
                return self._start(host) if do == "start" else self._kill(host)
            return answer({"pid": host.pid})
        source, target = self._host(request.pop("source")), self._host(request.pop("target"))
        wire = source.wires[target.index]
        if do == "link":
            wire.set(**request)
            self._set_segmentation(source)
        elif do == "cut":
            wire.cut = request["cut"]
        elif do == "stall":
            wire.stalled_until = time.monotonic() + request["seconds"]
        else:
            raise ValueError(f"no such command: {do!r}")
        return answer({})

    def _host(self, name: str) -> Host:
        if name not in self._by_name:
            raise ValueError(f"no host {name!r}; hosts are {', '.join(self._by_name)}")
        return self._by_name[name]

    def _start(self, host: Host) -> None:
        host.pid, from_host = namespaces.fork_host(
            host.name, host.ip, host.mac, host.cores, self._hosts_file, self._congestion_control
        )
        host.ended = os.pidfd_open(host.pid)
        self._readers[host.ended] = lambda: self._ended(host)

        def is_up() -> None:
            del self._readers[from_host.fileno()]
            with from_host:
                try:
                    host.tap = namespaces.receive_tap(from_host)
                except OSError as e:
                    return self._answer(host, {"error": f"host {host.name}: {e}"})
            os.set_blocking(host.tap, False)
            self._set_segmentation(host)
            self._frames[host.tap] = host
            return self._answer(host, {"pid": host.pid})

        self._readers[from_host.fileno()] = is_up

    def _kill(self, host: Host) -> None:
        if host.pid:
            os.kill(host.pid, signal.SIGKILL)

    def _ended(self, host: Host) -> None:
        os.waitpid(host.pid, 0)
        del self._readers[host.ended]
        os.close(host.ended)
        if host.tap >= 0:
            self._frames.pop(host.tap, None)
            os.close(host.tap)
        host.pid, host.ended, host.tap = 0, -1, -1
        self._answer(host, {"pid": 0})

    def _answer(self, host: Host, what: dict[str, Any]) -> None:
        for answer in self._waiting.pop(host.name, []):
            answer(what)

    def _set_segmentation(self, host: Host) -> None:
        if host.tap >= 0:
            namespaces.set_segmentation(host.tap, by_host=any(w.single_packets for w in host.wires))


def _wire_bytes(frame: bytes) -> int:
    """What a frame is on a wire: a segmented one (struct virtio_net_hdr) is several packets with headers each."""
    n_bytes = len(frame) - VIRTIO_HEADER_BYTES
    if not frame[1]:
        return n_bytes
    header_bytes, segment_bytes = struct.unpack_from("=HH", frame, 2)
    packets = -(-(n_bytes - header_bytes) // segment_bytes)
    return n_bytes + (packets - 1) * header_bytes


def _be_punctual() -> None:
    """Real time, where it is allowed: delays hold however busy the hosts keep the cores."""
    namespaces.set_timer_slack(1e-6)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        os.setpriority(os.PRIO_PROCESS, 0, -20)


def main(control_fd: int, settings: dict[str, Any]) -> None:
    """Runs the switch; see the top."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)  # the owner's end is the signal to end
    made = not Path(namespaces.RAY_DIRECTORY).exists()
    Path(namespaces.RAY_DIRECTORY).mkdir(exist_ok=True)  # for the hosts to mount theirs on
    _be_punctual()
    try:
        Switch(socket.socket(fileno=control_fd), settings).run()
    finally:
        shutil.rmtree(settings["directory"], ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                Path(namespaces.RAY_DIRECTORY).rmdir()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
