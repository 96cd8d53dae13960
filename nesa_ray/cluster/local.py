"""LocalCluster: a real Ray cluster on this one machine, as one node or several unequal ones."""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import random
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from nesa_ray.cluster import supervisor
from nesa_ray.cluster.labels import CORES, NICENESS, NODE, cores_to_label
from nesa_ray.errors import InvalidTopology, RuntimeFailure, Timeout

# Ray's own worker niceness is 15, which would hide ours.  A dead node is noticed in about three seconds instead of 15.
# Serve's proxy talks to replicas by gRPC, and routes on its own event loop: a request takes 6 ms there in place of 9.
# A replica has one event loop, too: with two, in a thread each, a streamed chunk takes it 0.15 ms in place of 0.11.
_CLUSTER_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "6",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
# For our process and for everything started from it: a FutureWarning at every ray.init otherwise.
_QUIET_ENVIRONMENT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# The `ray` command.  It imports the command groups of serve, state and job where it can: half of its start, not needed.
_RAY = """
import sys
for group in ("ray.serve.scripts", "ray.util.state.state_cli", "ray.dashboard.modules.job.cli"):
    sys.modules[group] = None
from ray.scripts.scripts import main
main()
"""


@dataclass(frozen=True, kw_only=True)
class LocalNode:
    """One emulated node.

    devices        CPU devices; the node has as many Ray CPUs as its devices have cores, plus spare_cpus.  None: it
                   has all of this process's cores, and a probe divides them into as many devices as it is asked for
    cores          cores of each device; by default one core each, dealt out of this process's affinity.  Devices of
                   different nodes may name the same cores: they then share them.
    niceness       0-19, of everything pinned on this node: its share of cores that busier nodes want too
    memory_bytes   memory of each device, or of all that a probe makes
    spare_cpus     Ray CPUs for actors of others that reserve some: of ours, stages alone do
    gpus           CUDA devices that belong to the node, as torch numbers them in this process
    """

    name: str
    devices: int | None = 2
    cores: tuple[tuple[int, ...], ...] = ()
    niceness: int = 0
    memory_bytes: float = 1e9
    spare_cpus: int = 0
    gpus: tuple[int, ...] = ()

    def resolved_cores(self) -> tuple[tuple[int, ...], ...]:
        """The cores of each device; raises InvalidTopology."""
        allowed = sorted(os.sched_getaffinity(0))
        if self.devices is None and self.cores:
            raise InvalidTopology(f"node {self.name}: cores: needs a number of devices, got {self.cores}")
        dealt = ((allowed[i % len(allowed)],) for i in range(self.devices or 0))
        cores = self.cores or (tuple(dealt) if self.devices is not None else (tuple(allowed),))
        if self.cores and len(self.cores) != self.devices:
            raise InvalidTopology(f"node {self.name}: cores: needs one group per device, {self.devices}, got {cores}")
        if missing := sorted({c for group in cores for c in group} - set(allowed)):
            raise InvalidTopology(f"node {self.name}: cores: needs cores {missing}, this process may use {allowed}")
        if not 0 <= self.niceness <= 19:
            raise InvalidTopology(f"node {self.name}: niceness: needs 0 to 19, got {self.niceness}")
        return cores


class LocalCluster:
    """Starts the nodes through `ray start`, stops exactly what it started, and leaves nothing behind.

    Inside `with`, this process's environment points at the cluster, so that `ray.init()` here and `ray job submit`,
    `serve deploy` or any driver started from here find it; it is put back at the end.  Everything listens on loopback
    addresses of the cluster's own (127.x.y.z, one per node): several clusters live side by side, and nothing outside
    the machine can reach them.

    Token authentication is on: the user's token if there is one, else a random one in this process's environment.
    The cluster ends with this process however that ends, SIGKILL included (see supervisor).  Linux only, like every
    local Ray cluster of several nodes.

    haproxy   Serve's applications are reached through HAProxy, a millisecond for a request in place of five.  Only for
              one node: Serve has HAProxy and every replica listen on the same address, and on loopback the replicas
              of other nodes would be out of its reach.  That address is to be named (`host`): with HAProxy Serve's own
              default is all interfaces, where its two pages of statistics listen as well, at free ports.

    Raises InvalidTopology for nodes that can't be emulated, Timeout or RuntimeFailure when Ray doesn't start.
    """

    def __init__(
        self,
        nodes: Sequence[LocalNode],
        *,
        dashboard: bool = True,
        haproxy: bool = False,
        object_store_bytes: int = 80_000_000,
        max_seconds: float = 120.0,
    ) -> None:
        names = [n.name for n in nodes]
        if not names or len(set(names)) != len(names):
            raise InvalidTopology(f"nodes: needs at least one, each with a name of its own, got {names}")
        if haproxy and len(names) > 1:
            raise InvalidTopology(f"nodes: haproxy: needs a cluster of one node, got {', '.join(names)}")
        self.nodes = tuple(nodes)
        self._haproxy = haproxy
        self._cores = [n.resolved_cores() for n in nodes]
        self._dashboard, self._object_store_bytes, self._max_seconds = dashboard, object_store_bytes, max_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._replaced: dict[str, str | None] = {}
        self.address = ""
        self.dashboard_url = ""
        self.environment: Mapping[str, str] = {}

    def __enter__(self) -> LocalCluster:
        end = time.monotonic() + self._max_seconds
        net = f"127.{random.SystemRandom().randint(1, 254)}.{random.SystemRandom().randint(0, 255)}"
        head = f"{net}.1"
        port, dashboard_port, client_port = free_ports(3)
        self.address = f"{head}:{port}"
        self.dashboard_url = f"http://{head}:{dashboard_port}" if self._dashboard else ""
        self.environment = driver_environment(self.address)
        if self._dashboard:
            self.environment |= {
                "RAY_API_SERVER_ADDRESS": self.dashboard_url,
                "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            }
        directory = tempfile.mkdtemp(prefix="nr", dir="/tmp")  # Unix socket paths below it are limited to 107 bytes
        if self._haproxy:
            self.environment |= _haproxy_environment(directory)
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, directory],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            threading.Thread(target=_collect, args=(self._process, answers), daemon=True).start()
            options = head_options(head, port, dashboard_port if self._dashboard else None)
            self._start(0, head, [*options, f"--ray-client-server-port={client_port}"], directory)
            self._wait_for_gcs(head, port, answers, directory, end)
            for i in range(1, len(self.nodes)):
                self._start(i, f"{net}.{i + 1}", worker_options(self.address), directory)
            for _ in self.nodes:
                self._answer(answers, directory, end)
        except BaseException:
            self.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self._replaced = {name: os.environ.get(name) for name in self.environment}
        _set_environment(self.environment)
        return self

    def connect(self, **options: Any) -> None:
        """Makes this process a driver of the cluster, quietly; `options` go to ray.init.  Undone by close()."""
        import ray

        ray.init(
            address=self.address,
            **{"logging_level": "error", "log_to_driver": False, "configure_logging": True, **options},
        )

    def close(self) -> None:
        """Disconnects this process and stops every process of the cluster.  Idempotent."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized() and ray.get_runtime_context().gcs_address == self.address:
            ray.shutdown()
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _set_environment(self._replaced)
        self._replaced = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, index: int, ip: str, options: list[str], directory: str) -> None:
        node = self.nodes[index]
        argv = [
            *ray_start(node, self._cores[index], ip, self._object_store_bytes),
            *options,
            f"--temp-dir={directory}/r",
        ]
        env = node_environment(node, self.environment)
        request = {"name": node.name, "argv": argv, "env": env, "log": f"{directory}/{index}.log"}
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, answers: queue.SimpleQueue[dict[str, Any]], directory: str, end: float) -> None:
        """Takes one answer: a node is up, or it failed to start, or time is up."""
        try:
            answer = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise Timeout(f"the local Ray cluster didn't start within {self._max_seconds:g} s") from None
        if answer["code"]:
            index = [n.name for n in self.nodes].index(answer["name"])
            said = Path(f"{directory}/{index}.log").read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeFailure(f"node {answer['name']}: `ray start` failed: {' | '.join(said)}")

    def _wait_for_gcs(
        self, ip: str, port: int, answers: queue.SimpleQueue[dict[str, Any]], directory: str, end: float
    ) -> None:
        """A worker started before the GCS listens backs off for seconds; one started after overlaps the head."""
        while True:
            try:
                socket.create_connection((ip, port), 1.0).close()
                return
            except OSError:
                time.sleep(0.05)
            if not answers.empty() or time.monotonic() > end:
                self._answer(answers, directory, time.monotonic())


def driver_environment(address: str) -> dict[str, str]:
    """What a driver of a new cluster at this address has in its environment, a random token included.

    Serve has its own proxy there, whatever the user's own cluster has (see _haproxy_environment).
    """
    return {"RAY_ADDRESS": address, "RAY_SERVE_ENABLE_HA_PROXY": "0", **_QUIET_ENVIRONMENT, **_authentication()}


def node_environment(node: LocalNode, driver: Mapping[str, str]) -> dict[str, str]:
    """The environment of a node's `ray start`, in a cluster whose drivers have `driver`."""
    environment = {**os.environ, **_CLUSTER_ENVIRONMENT, **driver}
    environment.pop("RAY_ADDRESS")  # `ray start --head` would take it for a cluster to join
    if node.gpus:
        visible = [g for g in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[g] if visible else str(g) for g in node.gpus)
    return environment


def _haproxy_environment(directory: str) -> dict[str, str]:
    """Serve's settings for HAProxy in place of its own proxy: ports and, below the directory, files of its own.

    A client that says and reads nothing is given up after 30 s, in place of an hour: more such connections than HAProxy
    takes, which has up to 2.5 files open for each, would keep everybody else waiting for as long.
    """
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    ports = ("FALLBACK_PROXY_HTTP", "HAPROXY_METRICS", "HAPROXY_STATS")
    files = ("CONFIG_FILE_LOC", "SOCKET_PATH", "SERVER_STATE_FILE", "METRICS_SOCKET_PATH")
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_MAXCONN": str((65_536 if most_files < 0 else min(65_536, most_files)) // 3),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "900",  # an answer may take so long when it begins anew; 120 by default
        **{f"RAY_SERVE_{name}_PORT": str(port) for name, port in zip(ports, free_ports(3), strict=True)},
        **{f"RAY_SERVE_HAPROXY_{name}": f"{directory}/h/{name.lower()}" for name in files},
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{directory}/h",
        # How long a replica that is to end goes on taking requests: HAProxy hears of it within 0.2 s.  30 by default.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def ray_start(node: LocalNode, cores: Sequence[Sequence[int]], ip: str, object_store_bytes: int) -> list[str]:
    """The command that starts Ray's processes of a node, its labels included, but for its part in the cluster."""
    labels = {NODE: node.name, NICENESS: str(node.niceness)}
    if node.devices is not None:
        labels[CORES] = cores_to_label(cores)
    return [
        *(sys.executable, "-c", _RAY, "start", f"--node-ip-address={ip}"),
        f"--num-cpus={sum(map(len, cores)) + node.spare_cpus}",
        f"--num-gpus={len(node.gpus)}",
        f"--memory={math.ceil(node.memory_bytes * max(1, node.devices or 1))}",
        f"--object-store-memory={object_store_bytes}",
        f"--labels={','.join(f'{k}={v}' for k, v in labels.items())}",
        *("--min-worker-port=0", "--max-worker-port=0", "--log-style=record", "--log-color=false"),
    ]


def head_options(ip: str, port: int, dashboard_port: int | None) -> list[str]:
    """Of `ray start` on the first node; no dashboard without a port for it."""
    return [
        *("--head", f"--port={port}", "--disable-usage-stats"),
        f"--include-dashboard={dashboard_port is not None}",
        *([f"--dashboard-host={ip}", f"--dashboard-port={dashboard_port}"] if dashboard_port is not None else []),
        "--no-monitor",  # it only feeds an autoscaler
    ]


def worker_options(address: str) -> list[str]:
    """Of `ray start` on every other node."""
    return [f"--address={address}", "--include-log-monitor=false"]


def _collect(process: subprocess.Popen[bytes], answers: queue.SimpleQueue[dict[str, Any]]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(json.loads(line))


def free_ports(count: int) -> list[int]:
    """Ports that nobody has on any address of this machine, for who must be told one before it listens.

    They are such as the kernel gives nobody who asks for any, so that they are still free then.
    """
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    all_ports = range(20_000, 65_536)  # Ray's own are below
    ports = [p for p in all_ports if not low <= p <= high] or list(all_ports)
    random.SystemRandom().shuffle(ports)
    return list(itertools.islice(filter(_is_free, ports), count))


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            return False
        return True


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Sets this process's environment; None unsets."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "ray" in sys.modules:  # it has read its authentication mode at import, and remembers its token
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _authentication() -> dict[str, str]:
    """Ray's token settings: what the user chose, else token mode with the user's token or a random one."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return {}
    chosen = {"RAY_AUTH_MODE": "token"}
    named = any(os.environ.get(n) for n in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if not named and not (Path.home() / ".ray" / "auth_token").is_file():
        chosen["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return chosen
