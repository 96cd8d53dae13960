"""Several hosts on this machine, joined by links as slow as one likes.  Linux, root only.

Each host is a set of namespaces (network, processes, mounts, name, IPC) with /dev/shm and /tmp/ray of its own, confined
to its node's cores; a switch in user space joins them and gives each direction of each link a rate, a latency, loss,
reordering and outages (switch.py).  The files are shared: what is written on a host is here, but for those two places.

    with EmulatedHosts([LocalNode(name="a", devices=1), LocalNode(name="b", devices=1)], Link(12.5e6, 0.02)) as hosts:
        hosts.run("a", ["ping", "-c3", "b"])
        hosts.start_ray()
        hosts.call("a", train, "train.yaml")                # train() is a driver on host a
        hosts.set_link("a", "b", EmulatedLink(625e3, 0.05, loss=0.01))
        hosts.stall("a", "b", 10.0)

By hand, from two shells (`--help` says more):

    python benchmarks/emulated_hosts.py up --hosts 3 --bytes-per-s 12.5e6 --latency-s 0.02 --ray
    python benchmarks/emulated_hosts.py exec h0 bash

However the process that made them ends, nothing is left of the hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import namespaces, switch
from benchmarks.host_process import HostProcess, answer, reference
from nesa_ray.cluster.local import (
    LocalNode,
    driver_environment,
    head_options,
    node_environment,
    ray_start,
    worker_options,
)
from nesa_ray.cluster.topology import Link, Topology
from nesa_ray.errors import InvalidTopology, NesaError, RuntimeFailure, Timeout

NETWORK = "10.77.0"
PREFIX = "nesa-hosts-"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
_ALLOWED_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


@dataclass(frozen=True, slots=True)
class EmulatedLink(Link):
    """A Link that loses packets, reorders them, or has a queue of another length: see switch.Wire."""

    loss: float = 0.0
    reordering: float = 0.0
    queue_bytes: float | None = None


class RunningHosts:
    """Hosts that run, by the directory in which their switch listens; from any process of root's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def status(self) -> dict[str, dict[str, Any]]:
        """Each host's ip, the pid of its first process (0 while it is down), bytes sent and frames dropped."""
        hosts: dict[str, dict[str, Any]] = self._ask("status")["hosts"]
        return hosts

    def popen(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on a host, in this directory; `options` go to subprocess.Popen.

        Unless `env` says otherwise it has this process's environment, and what a driver of the hosts' Ray needs.  It
        ends with its host.
        """
        pid = self._known(host)["pid"]
        if not pid:
            raise RuntimeFailure(f"host {host} is down")
        options.setdefault("env", {**os.environ, **self.environment})
        enter = [sys.executable, "-I", "-S", namespaces.__file__, str(pid)]
        return subprocess.Popen([*enter, *command], **options)

    def run(self, host: str, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host to its end and returns what it printed; `options` as of subprocess.run."""
        limit, check = options.pop("timeout", None), options.pop("check", True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with self.popen(host, command, **{**pipes, **options}) as process:
            try:
                said, complaints = process.communicate(timeout=limit)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, said, complaints)
        return subprocess.CompletedProcess(command, process.returncode, said, complaints)

    def set_link(self, a: str, b: str, link: Link, *, one_way: bool = False) -> None:
        """Changes a link in both directions, or only from a to b, for the packets that are sent from now on."""
        unlimited = math.isinf(link.bytes_per_s)
        wire: dict[str, float] = {"latency_s": link.latency_s, "bytes_per_s": 0.0 if unlimited else link.bytes_per_s}
        if isinstance(link, EmulatedLink):
            wire |= {"loss": link.loss, "reordering": link.reordering}
            wire |= {"queue_bytes": link.queue_bytes} if link.queue_bytes is not None else {}
        self._on_wires("link", a, b, one_way, wire)

    def cut(self, a: str, b: str | None = None, *, one_way: bool = False) -> None:
        """Nothing sent over the link, or over all of a's links, arrives any more, until heal()."""
        self._on_wires("cut", a, b, one_way, {"cut": True})

    def heal(self, a: str, b: str | None = None, *, one_way: bool = False) -> None:
        """Undoes cut()."""
        self._on_wires("cut", a, b, one_way, {"cut": False})

    def stall(self, a: str, b: str | None, seconds: float, *, one_way: bool = False) -> None:
        """Nothing gets through for so long; then what was sent meanwhile, as far as the queue holds it, goes on."""
        self._on_wires("stall", a, b, one_way, {"seconds": seconds})

    def kill(self, host: str) -> None:
        """A power failure: every process of the host is gone when this returns."""
        self._ask("kill", host=host)

    def restart(self, host: str) -> None:
        """Starts a killed host, with the links it had and nothing running on it."""
        self._ask("start", host=host)

    @property
    def environment(self) -> dict[str, str]:
        """What processes on the hosts have in their environment besides their starter's."""
        environment: dict[str, str] = json.loads((self.directory / "environment.json").read_text())
        return environment

    def _known(self, host: str) -> dict[str, Any]:
        hosts = self.status()
        if host not in hosts:
            raise InvalidTopology(f"no host {host!r}; hosts are {', '.join(hosts)}")
        return hosts[host]

    def _on_wires(self, do: str, a: str, b: str | None, one_way: bool, settings: Mapping[str, Any]) -> None:
        for other in [b] if b is not None else [h for h in self.status() if h != a]:
            self._ask(do, source=a, target=other, **settings)
            if not one_way:
                self._ask(do, source=other, target=a, **settings)

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30.0)
            try:
                connection.connect(str(self.directory / "control"))
                connection.sendall(json.dumps({"do": do, **request}).encode() + b"\n")
                answer: dict[str, Any] = json.loads(connection.makefile().readline())
            except (OSError, ValueError):
                raise RuntimeFailure(f"the hosts' switch doesn't answer ({do})") from None
        if "error" in answer:
            raise RuntimeFailure(f"{do}: {answer['error']}")
        return answer


class EmulatedHosts(RunningHosts):
    """Hosts that run inside `with`, one for each node, and Ray on them when told to.

    nodes   those without `cores` get one for each device, dealt out of this process's affinity from host to host
    link    of every pair that `pairs` doesn't name; unlimited and at once by default
    pairs   by names of hosts; a pair named in one order only is the same in both directions
    seed    of what is lost and reordered
    congestion_control   TCP's on every host ("cubic", "bbr"); this machine's own if empty

    Raises InvalidTopology when hosts can't be emulated here or not so, RuntimeFailure when one doesn't start.
    """

    def __init__(
        self,
        nodes: Sequence[LocalNode],
        link: Link | None = None,
        pairs: Mapping[tuple[str, str], Link] | None = None,
        *,
        seed: int = 0,
        congestion_control: str = "",
    ) -> None:
        if why := namespaces.unavailable():
            raise InvalidTopology(why)
        allowed = _ALLOWED_CONGESTION_CONTROL.read_text().split()
        if congestion_control and congestion_control not in allowed:
            needed = f"needs one of {', '.join(allowed)} ({_ALLOWED_CONGESTION_CONTROL})"
            raise InvalidTopology(f"congestion_control: {needed}, got {congestion_control!r}")
        names = [n.name for n in nodes]
        if not 1 <= len(set(names)) == len(names) <= 254:
            raise InvalidTopology(f"hosts: needs 1 to 254, each with a name of its own, got {names}")
        deck = itertools.cycle(sorted(os.sched_getaffinity(0)))
        dealt = [n if n.cores else replace(n, cores=tuple((next(deck),) for _ in range(n.devices))) for n in nodes]
        self.nodes = {n.name: n for n in dealt}
        self._cores = {n.name: n.resolved_cores() for n in dealt}
        self.ip = {name: f"{NETWORK}.{i + 1}" for i, name in enumerate(names)}
        self._links = {(a, b): link or Link() for a in names for b in names if a != b}
        for a, b in pairs or {}:
            if a == b or not {a, b} <= set(names):
                raise InvalidTopology(f"pairs: {a} - {b}: needs two of the hosts {', '.join(names)}")
        self._links |= {(b, a): one for (a, b), one in (pairs or {}).items()}
        self._links |= dict(pairs or {})
        self._settings = {"seed": seed, "congestion_control": congestion_control}
        self._switch: subprocess.Popen[bytes] | None = None

    @classmethod
    def of(cls, topology: Topology, **options: Any) -> EmulatedHosts:
        """Hosts for the nodes of a cluster.json, each with its devices as CPU devices, and its links."""
        nodes: dict[str, list[Any]] = {}
        for d in topology.devices:
            nodes.setdefault(d.node, []).append(d)
        local = [
            LocalNode(
                name=name,
                devices=len(devices),
                cores=tuple(d.cores for d in devices) if all(d.cores for d in devices) else (),
                niceness=max(d.niceness for d in devices),
                memory_bytes=min(1e12, *(d.memory_bytes for d in devices)),
            )
            for name, devices in nodes.items()
        ]
        pairs = {(min(p), max(p)): link for p, link in topology.pairs.items()}
        return cls(local, topology.default, pairs, **options)

    def __enter__(self) -> EmulatedHosts:
        self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            self._set_environment({"GLOO_SOCKET_IFNAME": namespaces.DEVICE})
            lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in self.ip.items())]
            (self.directory / "hosts").write_text("\n".join(lines) + "\n")
            self._start_switch()
            for (a, b), link in self._links.items():
                self.set_link(a, b, link, one_way=True)
            for name in self.nodes:
                self.restart(name)
        except BaseException:
            self.close()
            shutil.rmtree(self.directory, ignore_errors=True)  # what the switch does, if there was one
            raise
        return self

    def _start_switch(self) -> None:
        cores = {name: sorted({c for group in groups for c in group}) for name, groups in self._cores.items()}
        hosts = [{"name": name, "ip": ip, "cores": cores[name]} for name, ip in self.ip.items()]
        settings = {**self._settings, "hosts": hosts, "directory": str(self.directory)}
        with socket.socket(socket.AF_UNIX) as control:
            control.bind(str(self.directory / "control"))
            control.listen(64)
            self._switch = subprocess.Popen(
                [sys.executable, "-I", switch.__file__, str(control.fileno()), json.dumps(settings)],
                stdin=subprocess.PIPE,
                pass_fds=[control.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """Ends every host with everything on it.  Idempotent."""
        process, self._switch = self._switch, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, host: str, function: Callable[..., object], *args: Any, **options: Any) -> HostProcess:
        """Runs function(pipe, *args) in a Python process on a host; the pipe's other end is the answer's `pipe`.

        The function is found by its module and name, as pickle would.  `options` go to subprocess.Popen.
        """
        ours, theirs = Pipe()
        with theirs:
            fd = theirs.fileno()
            path = f"import sys; sys.path[:] = {sys.path!r}"
            program = f"{path}; from benchmarks.host_process import be_called; be_called({fd})"
            process = self.popen(host, [sys.executable, "-c", program], pass_fds=[fd], **options)
        ours.send((reference(function), args))
        return HostProcess(process, ours)

    def call(self, host: str, function: Callable[..., Any], *args: Any, max_seconds: float | None = None) -> Any:
        """function(*args), computed by a Python process on a host.

        Raises RuntimeFailure with the host's traceback when it raises, or the host is killed; Timeout.
        """
        with self.start(host, answer, reference(function), args) as process:
            if not process.pipe.poll(max_seconds):
                raise Timeout(f"host {host}: {function.__qualname__}: not done within {max_seconds:g} s")
            try:
                done, result = process.pipe.recv()
            except EOFError:
                raise RuntimeFailure(f"host {host}: {function.__qualname__}: its process ended") from None
        if not done:
            raise RuntimeFailure(f"host {host}: {result}")
        return result

    def start_ray(
        self,
        *names: str,
        dashboard: bool = False,
        object_store_bytes: int = 80_000_000,
        environment: Mapping[str, str] | None = None,
        max_seconds: float = 120.0,
    ) -> None:
        """Starts Ray on the hosts named, or on all; the first host is the head, and the place for drivers.

        Nodes carry LocalCluster's labels and token authentication.  `environment` is the nodes' besides LocalCluster's.
        Raises RuntimeFailure when Ray doesn't start, Timeout.
        """
        end = time.monotonic() + max_seconds
        head, *_ = self.nodes
        address = f"{self.ip[head]}:{GCS_PORT}"
        if "RAY_ADDRESS" not in self.environment:
            self._set_environment({**self.environment, **driver_environment(address)})
        starting: dict[str, subprocess.Popen[bytes]] = {}
        for name in sorted(names or self.nodes, key=lambda n: n != head):  # the head first
            node, ip = self.nodes[name], self.ip[name]
            options = head_options(ip, GCS_PORT, DASHBOARD_PORT if dashboard else None) if name == head else None
            variables = {**node_environment(node, self.environment), **(environment or {})}
            command = [
                *ray_start(node, self._cores[name], ip, object_store_bytes),
                *(options or worker_options(address)),
            ]
            with open(self.directory / f"ray-{name}.log", "wb") as log:
                starting[name] = self.popen(
                    name, command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            if name == head:
                self._wait_for_gcs(head, starting[head], end)
        try:
            for name, process in starting.items():
                if process.wait(max(0.0, end - time.monotonic())):
                    log_file = self.directory / f"ray-{name}.log"
                    said = log_file.read_text(errors="replace").strip().splitlines()[-3:]
                    raise RuntimeFailure(f"host {name}: `ray start` failed: {' | '.join(said)}")
        except subprocess.TimeoutExpired:
            raise Timeout(f"host {name}: `ray start` wasn't done within {max_seconds:g} s") from None

    def _wait_for_gcs(self, head: str, process: subprocess.Popen[bytes], end: float) -> None:
        """Until the head listens: a worker started before would back off for seconds."""
        sockets = Path(f"/proc/{self._known(head)['pid']}/net/tcp")
        listening = f":{GCS_PORT:04X} 00000000:0000 0A "
        while time.monotonic() < end and process.poll() is None and listening not in sockets.read_text():
            time.sleep(0.05)

    def _set_environment(self, environment: Mapping[str, str]) -> None:
        (self.directory / "environment.json").write_text(json.dumps(dict(environment)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.do(options) or 0)
    except NesaError as e:
        print(f"emulated_hosts: {e}", file=sys.stderr)
        return e.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="emulated_hosts.py"
    )
    parser.add_argument("--at", type=Path, help="the hosts' directory, if several sets of hosts run")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, do: Callable[[argparse.Namespace], object], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(do=do)
        return added

    def add_link(to: argparse.ArgumentParser) -> None:
        to.add_argument("--bytes-per-s", type=float, default=float("inf"), help="rate of each direction")
        to.add_argument("--latency-s", type=float, default=0.0, help="one way")
        to.add_argument("--loss", type=float, default=0.0, help="part of the packets that is lost")
        to.add_argument("--reordering", type=float, default=0.0, help="part of the packets that others overtake")
        to.add_argument("--queue-bytes", type=float, help="what waits for the rate before packets are dropped")

    up = command("up", _up, "start hosts h0, h1, ... until Ctrl-C, or until a command on the first one ends")
    up.add_argument("--hosts", type=int, default=2, help="how many, of one core each")
    up.add_argument("--cluster", type=Path, help="a cluster.json: its nodes and links instead")
    add_link(up)
    up.add_argument("--congestion-control", default="", help="TCP's: cubic, bbr; else this machine's own")
    up.add_argument("--ray", action="store_true", help="start a Ray cluster over them")
    up.add_argument("command", nargs=argparse.REMAINDER, help="runs on the first host")
    execute = command("exec", _exec, "run a command on a host")
    execute.add_argument("host")
    execute.add_argument("command", nargs=argparse.REMAINDER, help="by default a shell")
    link = command("link", _link, "set a link's rate, latency, loss, reordering")
    add_link(link)
    cut = command("cut", lambda o: _running(o.at).cut(o.a, o.b, one_way=o.one_way), "cut a link")
    heal = command("heal", lambda o: _running(o.at).heal(o.a, o.b, one_way=o.one_way), "undo a cut")
    about = "hold a link up for some seconds, then let what was queued go on"
    stall = command("stall", lambda o: _running(o.at).stall(o.a, o.b, o.seconds, one_way=o.one_way), about)
    for one in (link, cut, heal, stall):
        one.add_argument("a")
        one.add_argument("b")
        one.add_argument("--one-way", action="store_true", help="only from a to b")
    stall.add_argument("seconds", type=float)
    for name, do, about in (
        ("kill", RunningHosts.kill, "a power failure of a host"),
        ("restart", RunningHosts.restart, "start a killed host; Ray isn't started on it"),
    ):
        command(name, lambda o, do=do: do(_running(o.at), o.host), about).add_argument("host")  # type: ignore[misc]
    command("status", lambda o: print(json.dumps(_running(o.at).status(), indent=1)), "each host's address and pid")
    return parser


def _up(options: argparse.Namespace) -> int:
    extra = {"congestion_control": options.congestion_control}
    if options.cluster:
        hosts = EmulatedHosts.of(Topology.from_json(options.cluster), **extra)
    else:
        nodes = [LocalNode(name=f"h{i}", devices=1) for i in range(options.hosts)]
        hosts = EmulatedHosts(nodes, _link_of(options), **extra)
    with _terminating(), hosts:
        if options.ray:
            hosts.start_ray()
        first = next(iter(hosts.nodes))
        if command := _command(options):
            return hosts.popen(first, command).wait()
        print(f"{hosts.directory}: " + ", ".join(f"{name} {ip}" for name, ip in hosts.ip.items()))
        print(f"from another shell: python {sys.argv[0]} exec {first} bash.  Ctrl-C ends the hosts.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM and SIGHUP end the hosts as Ctrl-C does, and Ctrl-C does even in a shell's background."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, interrupt)
    yield


def _exec(options: argparse.Namespace) -> int:
    command = _command(options) or [os.environ.get("SHELL", "/bin/sh")]
    return _running(options.at).popen(options.host, command).wait()


def _command(options: argparse.Namespace) -> list[str]:
    return list(options.command[1:] if options.command[:1] == ["--"] else options.command)


def _link(options: argparse.Namespace) -> None:
    _running(options.at).set_link(options.a, options.b, _link_of(options), one_way=options.one_way)


def _link_of(options: argparse.Namespace) -> EmulatedLink:
    return EmulatedLink(options.bytes_per_s, options.latency_s, options.loss, options.reordering, options.queue_bytes)


def _running(directory: Path | None) -> RunningHosts:
    """The hosts in a directory, or the only ones that run."""
    if why := namespaces.unavailable():
        raise InvalidTopology(why)
    if directory is None:
        running = sorted(p.parent for p in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/control"))
        if len(running) != 1:
            found = f"{len(running)} sets of hosts run: choose by --at {' or '.join(map(str, running))}"
            raise InvalidTopology(found if running else "no hosts run: start some with `emulated_hosts.py up`")
        directory = running[0]
    return RunningHosts(directory)


if __name__ == "__main__":
    sys.exit(main())
