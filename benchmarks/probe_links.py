"""What `nesa-ray probe` says of emulated links, against what they are: latency and bandwidth.  Linux, root only.

    python benchmarks/probe_links.py [--quick] [--congestion-control cubic]

One pair of hosts at each setting, then a tournament of eight hosts whose links are all of these, as probe() plays it,
then `nesa-ray probe` itself on a Ray cluster of three hosts.  A rate counts whole packets: TCP's payload is 95.6 % of
it.  What an unlimited link gives is what a plain transfer over it gets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import namespaces
from benchmarks.arms import conclude
from benchmarks.emulated_hosts import EmulatedHosts
from benchmarks.host_process import HostProcess
from nesa_ray.cluster.local import LocalNode
from nesa_ray.cluster.measure import LinkServer, measure_link
from nesa_ray.cluster.probe import link_share, tournament
from nesa_ray.cluster.topology import Link, Topology

MBIT = 1e6 / 8
HOSTS = 8
# There and back; a probe says the slower of the two.
SETTINGS = {
    "20 ms, 100 Mbit": (Link(100 * MBIT, 0.02), Link(100 * MBIT, 0.02)),
    "20 ms, 20 Mbit": (Link(20 * MBIT, 0.02), Link(20 * MBIT, 0.02)),
    "50 ms, 5 Mbit": (Link(5 * MBIT, 0.05), Link(5 * MBIT, 0.05)),
    "50 ms, 1 Mbit": (Link(1 * MBIT, 0.05), Link(1 * MBIT, 0.05)),
    "20 ms, 100 and 5 Mbit": (Link(100 * MBIT, 0.02), Link(5 * MBIT, 0.02)),
    "5 and 35 ms, 10 and 50 Mbit": (Link(10 * MBIT, 0.005), Link(50 * MBIT, 0.035)),
}


def host(pipe: Connection, ip: str) -> None:
    """What probe() has on a node: answers measurements, and measures the links it is told to."""
    server = LinkServer(ip)
    pipe.send(server.address)
    try:
        while True:
            address, seconds = pipe.recv()
            pipe.send(measure_link(address, seconds))
    except EOFError:
        server.close()


def sink(pipe: Connection, ip: str) -> None:
    """Takes one plain transfer and sends the bytes per second of all but its first quarter of a second."""
    with socket.create_server((ip, 0)) as server:
        pipe.send(server.getsockname())
        connection, _ = server.accept()
    buffer, counted, start = bytearray(1 << 20), 0, time.monotonic()
    with connection:
        while got := connection.recv_into(buffer):
            if time.monotonic() - start > 0.25:
                counted += got
    pipe.send(counted / (time.monotonic() - start - 0.25))


def source(address: tuple[str, int], seconds: float) -> None:
    """Sends as much as it can."""
    payload, end = bytes(1 << 20), time.monotonic() + seconds
    with socket.create_connection(address) as connection:
        while time.monotonic() < end:
            connection.sendall(payload)


def transfer(hosts: EmulatedHosts, a: str, b: str) -> float:
    """The bytes per second of a plain transfer of a second."""
    with hosts.start(b, sink, hosts.ip[b]) as taking:
        hosts.call(a, source, taking.pipe.recv(), 1.0)
        return float(taking.pipe.recv())


def nodes(count: int) -> list[LocalNode]:
    """One device each."""
    return [LocalNode(name=f"h{i}", devices=1) for i in range(count)]


def truth(there: Link, back: Link) -> Link:
    """What a probe should say of a link with two directions."""
    return Link(min(there.bytes_per_s, back.bytes_per_s), (there.latency_s + back.latency_s) / 2)


def set_both(hosts: EmulatedHosts, a: str, b: str, links: tuple[Link, Link]) -> None:
    """There and back."""
    hosts.set_link(a, b, links[0], one_way=True)
    hosts.set_link(b, a, links[1], one_way=True)


def play(
    at: Mapping[str, HostProcess], matches: Sequence[tuple[str, str]], addresses: Any, share_s: float
) -> list[Link]:
    """Measures links at the same time, each from its first host."""
    for a, b in matches:
        at[a].pipe.send((addresses[b], share_s))
    return [at[a].pipe.recv() for a, _ in matches]


def compare(arm: str, setting: str, true: Link, measured: Link, **more: Any) -> float:
    """Prints a row; how far the measured link is off, in parts."""
    off = abs(measured.bytes_per_s / true.bytes_per_s - 1)
    row = {"arm": arm, "link": setting, "mbit_per_s": true.bytes_per_s / MBIT, "probed": measured.bytes_per_s / MBIT}
    row |= {"latency_ms": 1e3 * true.latency_s, "probed_ms": 1e3 * measured.latency_s}
    if true.latency_s:
        off = max(off, abs(measured.latency_s / true.latency_s - 1))
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in {**row, **more, "off": off}.items()}
    print(json.dumps(rounded), flush=True)
    return off


def pairs(congestion_control: str) -> list[float]:
    """Two hosts, setting by setting, each in the time that a link of eight nodes gets; the unlimited link last."""
    offs, share_s = [], link_share(HOSTS, math.inf)
    with EmulatedHosts(nodes(2), congestion_control=congestion_control) as hosts, ExitStack() as stack:
        at = {n: stack.enter_context(hosts.start(n, host, hosts.ip[n])) for n in hosts.nodes}
        addresses = {n: p.pipe.recv() for n, p in at.items()}
        for setting, links in SETTINGS.items():
            set_both(hosts, "h0", "h1", links)
            began = time.monotonic()
            (measured,) = play(at, [("h0", "h1")], addresses, share_s)
            offs.append(compare("pair", setting, truth(*links), measured, seconds=time.monotonic() - began))
        hosts.set_link("h0", "h1", Link())
        probed, plain = [], []
        for _ in range(5):  # in turn: what drifts in the machine cancels
            probed += play(at, [("h0", "h1")], addresses, share_s)
            plain.append(min(transfer(hosts, "h0", "h1"), transfer(hosts, "h1", "h0")))
        ratio = statistics.median(p.bytes_per_s / q for p, q in zip(probed, plain, strict=True))
        true, latency_s = Link(statistics.median(plain)), statistics.median(p.latency_s for p in probed)
        offs.append(compare("pair", "unlimited", true, Link(ratio * true.bytes_per_s, latency_s)))
    return offs


def all_pairs(count: int, congestion_control: str) -> tuple[list[float], float]:
    """A tournament over hosts whose links take the settings in turn; how far it is off, and its seconds."""
    offs = []
    settings = itertools.cycle(SETTINGS)
    with EmulatedHosts(nodes(count), congestion_control=congestion_control) as hosts, ExitStack() as stack:
        setting = {match: next(settings) for match in itertools.combinations(hosts.nodes, 2)}
        for (a, b), name in setting.items():
            set_both(hosts, a, b, SETTINGS[name])
        at = {n: stack.enter_context(hosts.start(n, host, hosts.ip[n])) for n in hosts.nodes}
        addresses = {n: p.pipe.recv() for n, p in at.items()}
        began, rounds = time.monotonic(), tournament(list(hosts.nodes))
        share_s = link_share(len(rounds) + 1, math.inf)
        played: dict[tuple[str, str], Link] = {}
        for matches in rounds:
            played.update(zip(matches, play(at, matches, addresses, share_s), strict=True))
        seconds = time.monotonic() - began
    for (a, b), link in played.items():
        name = setting[min(a, b), max(a, b)]
        offs.append(compare(f"{count} hosts", f"{a} - {b}: {name}", truth(*SETTINGS[name]), link))
    return offs, seconds


def ray_cluster(congestion_control: str) -> tuple[list[float], float]:
    """`nesa-ray probe`, on the first of three hosts."""
    three = dict(zip(itertools.combinations(("h0", "h1", "h2"), 2), list(SETTINGS)[1:4], strict=True))
    with EmulatedHosts(nodes(3), congestion_control=congestion_control) as hosts, tempfile.TemporaryDirectory() as out:
        hosts.start_ray()
        for (a, b), name in three.items():
            set_both(hosts, a, b, SETTINGS[name])
        began = time.monotonic()
        hosts.run("h0", [sys.executable, "-m", "nesa_ray.cli", "probe", "--out", f"{out}/cluster.json"])
        seconds, topology = time.monotonic() - began, Topology.from_json(f"{out}/cluster.json")
    offs = [
        compare("nesa-ray probe", f"{a} - {b}: {name}", truth(*SETTINGS[name]), topology.link(a, b))
        for (a, b), name in three.items()
    ]
    return offs, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four hosts instead of eight, and no Ray")
    parser.add_argument("--congestion-control", default="", help="TCP's; else this machine's own")
    options = parser.parse_args()
    if why := namespaces.unavailable():
        print(f"probe_links: left out: {why}", file=sys.stderr)
        return
    ratios = {"a pair: off by at most": max(pairs(options.congestion_control))}
    count = 4 if options.quick else HOSTS
    offs, seconds = all_pairs(count, options.congestion_control)
    ratios |= {"all pairs: off by at most": max(offs), f"{count} hosts: seconds": seconds}
    if not options.quick:
        offs, seconds = ray_cluster(options.congestion_control)
        ratios |= {"nesa-ray probe: off by at most": max(offs), "nesa-ray probe: seconds": seconds}
    goals = {
        "a pair: off by at most": 0.15, "all pairs: off by at most": 0.15, "8 hosts: seconds": 30.0,
        "nesa-ray probe: off by at most": 0.15,
    }  # fmt: skip
    conclude("probe_links", ratios, goals, at_most=list(goals))


if __name__ == "__main__":
    main()
