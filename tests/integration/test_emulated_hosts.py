"""Hosts emulated on this machine do what they say, and nesa-ray's probe says what they do."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import emulated_hosts, namespaces
from benchmarks.emulated_hosts import EmulatedHosts, EmulatedLink
from benchmarks.probe_links import host as probed_host
from benchmarks.switch import Wire
from nesa_ray.cluster.local import LocalNode
from nesa_ray.cluster.topology import Link
from nesa_ray.errors import InvalidTopology, RuntimeFailure
from tests.integration.on_hosts import describe, drive, echo, receive_numbers, send_numbers, trips

ROOT = Path(emulated_hosts.__file__).resolve().parents[1]
needs_hosts = pytest.mark.skipif(bool(namespaces.unavailable()), reason=namespaces.unavailable())


@pytest.fixture(scope="module")
def hosts() -> Iterator[EmulatedHosts]:
    with EmulatedHosts([LocalNode(name=n, devices=1, memory_bytes=5e8) for n in ("one", "two", "three")]) as running:
        yield running


def test_a_wire_takes_a_packets_length_and_the_latency() -> None:
    wire = Wire(random.Random(0))
    assert wire.arrival(1.0, 1500) == 1.0
    wire.set(bytes_per_s=1000.0, latency_s=0.5, queue_bytes=250)
    assert [wire.arrival(1.0, 100) for _ in range(5)] == pytest.approx([1.6, 1.7, 1.8, -1, -1])  # the queue is full
    assert wire.arrival(1.2, 100) == pytest.approx(1.9)
    assert wire.arrival(9.0, 100) == pytest.approx(9.6)
    wire.stalled_until = 12.0
    assert [wire.arrival(10.0, 100) for _ in range(2)] == pytest.approx([12.6, 12.7])
    wire.cut = True
    assert wire.arrival(20.0, 100) == -1
    lossy = Wire(random.Random(0))
    lossy.set(latency_s=0.01, loss=0.1, reordering=0.1)
    arrivals = [lossy.arrival(0.0, 100) for _ in range(10_000)]
    assert 0.09 < sum(a < 0 for a in arrivals) / 10_000 < 0.11
    assert 0.09 < sum(a > 0.01 for a in arrivals) / sum(a >= 0 for a in arrivals) < 0.11
    assert max(arrivals) < 0.02


def test_where_hosts_cannot_be_emulated_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert emulated_hosts.main(["up"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "emulated_hosts: emulated hosts need root: they are network namespaces and TAP devices\n"


@needs_hosts
def test_hosts_that_cannot_be_made() -> None:
    with pytest.raises(InvalidTopology, match="each with a name of its own"):
        EmulatedHosts([LocalNode(name="a"), LocalNode(name="a")])
    with pytest.raises(InvalidTopology, match="pairs: a - c: needs two of the hosts a, b"):
        EmulatedHosts([LocalNode(name="a"), LocalNode(name="b")], pairs={("a", "c"): Link()})
    with pytest.raises(InvalidTopology, match=r"congestion_control: needs one of .*, got 'none'"):
        EmulatedHosts([LocalNode(name="a")], congestion_control="none")


@needs_hosts
def test_a_host_has_its_own_name_processes_memory_files_and_cores(hosts: EmulatedHosts) -> None:
    expected = {"name": "two", "ip": hosts.ip["two"], "processes": 2, "shm": ["mine"], "ray": ["mine"]}
    assert hosts.call("two", describe) == {**expected, "cores": sorted(hosts.nodes["two"].cores[0])}
    assert not Path("/dev/shm/mine").exists()
    assert hosts.run("one", ["hostname"]).stdout == "one\n"
    assert hosts.run("one", ["sh", "-c", "exit 7"], check=False).returncode == 7
    with pytest.raises(RuntimeFailure, match=r"host one: (?s:.*)invalid literal for int"):
        hosts.call("one", int, "x")


@needs_hosts
def test_a_link_has_the_latency_and_the_rate_that_were_set(hosts: EmulatedHosts) -> None:
    with hosts.start("two", echo, hosts.ip["two"]) as process:
        address = process.pipe.recv()
        assert min(hosts.call("one", trips, address, 50)) < 2e-3
        hosts.set_link("one", "two", Link(latency_s=0.02))
        assert 0.04 <= min(hosts.call("one", trips, address, 10)) < 0.042
        # 60 KB with a header of 66 bytes for every 1448 take half a second at 1 Mbit; coming back they hardly wait.
        hosts.set_link("one", "two", Link(125e3, 0.02), one_way=True)
        assert min(hosts.call("one", trips, address, 2, 60_000)) == pytest.approx(0.04 + 0.502, rel=0.1)
        hosts.set_link("one", "two", Link())


@needs_hosts
def test_outages(hosts: EmulatedHosts) -> None:
    with hosts.start("two", echo, hosts.ip["two"]) as process:
        address = process.pipe.recv()
        hosts.cut("one", "two")
        with pytest.raises(RuntimeFailure, match=r"No route to host|timed out|Timeout"):
            hosts.call("one", socket.create_connection, address, 0.5)
        hosts.heal("one", "two")
        assert min(hosts.call("one", trips, address, 50)) < 2e-3
    with hosts.start("two", receive_numbers, hosts.ip["two"]) as receiver:
        address = receiver.pipe.recv()
        hosts.stall("one", "two", 1.0)
        start = time.monotonic()
        hosts.call("one", send_numbers, address, 10)
        assert receiver.pipe.recv() == list(range(10))
        assert time.monotonic() - start > 1.4  # half a second of them is the receiver's own wait


@needs_hosts
def test_packets_are_lost_and_overtaken(hosts: EmulatedHosts) -> None:
    with hosts.start("two", receive_numbers, hosts.ip["two"]) as receiver:
        hosts.set_link("one", "two", EmulatedLink(latency_s=0.005, loss=0.1, reordering=0.2))
        hosts.call("one", send_numbers, receiver.pipe.recv(), 2000)
        numbers = receiver.pipe.recv()
        hosts.set_link("one", "two", Link())
    assert 1700 < len(numbers) < 1880
    assert sum(a > b for a, b in pairwise(numbers)) > 50


@needs_hosts
def test_a_killed_host_is_gone_and_comes_back_empty(hosts: EmulatedHosts) -> None:
    process = hosts.popen("three", ["sh", "-c", "touch /dev/shm/left; exec sleep 1000"])
    hosts.run("three", ["sh", "-c", "until [ -e /dev/shm/left ]; do sleep 0.01; done"])
    hosts.kill("three")
    assert process.wait(5) == -signal.SIGKILL
    with pytest.raises(RuntimeFailure, match="host three is down"):
        hosts.run("three", ["true"])
    hosts.restart("three")
    assert hosts.run("three", ["ls", "/dev/shm"]).stdout == ""
    with hosts.start("three", echo, hosts.ip["three"]) as again:
        assert min(hosts.call("one", trips, again.pipe.recv(), 10)) < 2e-3


KILLED = """
import json, os, time
from benchmarks.emulated_hosts import EmulatedHosts, LocalNode
with EmulatedHosts([LocalNode(name="a"), LocalNode(name="b")]) as hosts:
    command = hosts.popen("a", ["sleep", "1000"])
    pids = [hosts._switch.pid, command.pid, *(h["pid"] for h in hosts.status().values())]
    print(json.dumps({"pids": pids, "directory": str(hosts.directory)}), flush=True)
    END
"""


@needs_hosts
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "time.sleep(60)"])
def test_nothing_is_left_however_the_owner_ends(end: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", KILLED.replace("END", end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert owner.stdout is not None
    said = json.loads(owner.stdout.readline())
    if "sleep" in end:
        owner.send_signal(signal.SIGINT)  # Ctrl-C
    owner.wait(20)
    for _ in range(100):
        left = [p for p in said["pids"] if Path(f"/proc/{p}").exists()]
        if not left and not Path(said["directory"]).exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {left}, {said['directory']}")


@needs_hosts
def test_the_probe_says_the_slower_direction_of_a_link_within_a_tenth(hosts: EmulatedHosts) -> None:
    hosts.set_link("one", "two", Link(12.5e6, 0.02), one_way=True)
    hosts.set_link("two", "one", Link(625e3, 0.02), one_way=True)
    hosts.set_link("one", "three", Link(125e3, 0.05))
    with contextlib.ExitStack() as stack:
        at = {n: stack.enter_context(hosts.start(n, probed_host, hosts.ip[n])) for n in hosts.nodes}
        addresses = {n: process.pipe.recv() for n, process in at.items()}
        # At the same time, as pairs without a common node are measured.
        at["two"].pipe.send((addresses["one"], 3.0))
        at["three"].pipe.send((addresses["one"], 3.0))
        uneven, slow = at["two"].pipe.recv(), at["three"].pipe.recv()
    hosts.set_link("one", "two", Link())
    hosts.set_link("one", "three", Link())
    assert (uneven.bytes_per_s, uneven.latency_s) == (pytest.approx(625e3, rel=0.1), pytest.approx(0.02, rel=0.1))
    assert (slow.bytes_per_s, slow.latency_s) == (pytest.approx(125e3, rel=0.1), pytest.approx(0.05, rel=0.1))


@needs_hosts
@pytest.mark.slow
def test_a_ray_cluster_over_the_hosts(hosts: EmulatedHosts) -> None:
    hosts.start_ray("one", "two")
    hosts.set_link("one", "two", Link(2.5e6, 0.02))
    assert hosts.call("one", drive, max_seconds=90.0) == {
        "nodes": {name: (hosts.ip[name], 5e8) for name in ("one", "two")},
        "sits on": "two",
        "authentication": "token",
    }
