"""probe(): measures a live Ray cluster and describes it as a Topology.

One actor per device, pinned just as a stage will be.  It ends with the measurement, or stays for the stage (`keep`).
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nesa_ray.cluster.cores import as_neighbours, part_of
from nesa_ray.cluster.joining import connect
from nesa_ray.cluster.labels import CORES, NICENESS, NODE, label_to_cores
from nesa_ray.cluster.measure import LinkServer, flops_meter, free_memory, level, measure_link, memory_meter
from nesa_ray.cluster.pinning import pin
from nesa_ray.cluster.topology import Device, Link, Topology
from nesa_ray.errors import InvalidTopology, RuntimeFailure, Timeout
from nesa_ray.garbage import kept

# Others come and go, Ray's own processes too: a device is as fast as in its better rounds, of which there are this many
# unless the first few agree on how fast every device is.
ROUNDS, ENOUGH_ROUNDS, ALIKE = 8, 3, 1.05
LINKS_S, LINK_S = 27.0, 8.0  # all rounds of links, one link: eight nodes are measured in half a minute
INSIDE_S = 0.3  # a link inside a node is seldom what a plan depends on
T = TypeVar("T")
_PART = re.compile(r"(.+)/cpu\d+of([1-9]\d*)")  # a device's id where its node is divided by who asked for so many


def probe(max_seconds: float = 60.0, *, devices: int | Collection[str] = 1) -> Topology:
    """Measures every device and every link of the cluster that this process is connected to, or can find.

    A GPU node is one device per GPU; a CPU node is the devices of its nesa-cores label.  One without the label is one
    device of all its Ray CPUs; where `devices` are more than there are so, such nodes are divided into equal ones, that
    with the largest first, down to one for each Ray CPU.  Nodes with none of these are left out.

    Device ids are "<node>/gpu0", "<node>/cpu0", and "<node>/cpu0of2" where a node is divided; for a node's name see
    `names`.  `devices` may be such ids, a plan's: then nodes are divided as they say, and they alone are measured.  All
    GPUs of one node should be alike: Ray decides which one a stage gets.  `default` is the slowest link inside a node.
    Idle devices are assumed: what else runs slows what is measured.

    Raises InvalidTopology when there is no live cluster, or none with a device, or not the named ones, or a label that
    can't be read; Timeout when devices are busy or the cluster is too slow for max_seconds; RuntimeFailure when a node
    dies or is unreachable.
    """
    with Probes(devices=devices) as probes:
        return probes.measured(max_seconds)


class Probes:
    """One actor on each of some devices, a Probe at least: measures them, and may then stay for what is to run there.

    A context manager: at its end all actors end that weren't kept.
    """

    def __init__(
        self,
        *,
        devices: int | Collection[str] = 1,
        only: Callable[[Sequence[str]], Collection[str]] = lambda devices: devices,
        kind: type[Probe] | None = None,
    ) -> None:
        """Starts the actors, of that kind, and doesn't wait for them.

        devices  as `probe` has them
        only     chooses from the ids of all devices those that get an actor

        Raises InvalidTopology when there is no live cluster, or none with a device, or a label that can't be read.
        Named devices that aren't there are an error only of who wants to know of them (`measured`, `present`).
        """
        connect()
        slots = _live_slots(devices)
        chosen = only([s.id for s in slots])
        self._missing = [] if isinstance(devices, int) else sorted(set(devices) - set(chosen))
        self._actors = {s: _actor(s, kind or Probe) for s in slots if s.id in chosen}
        self._ready: list[Any] = []
        of_node: dict[str, list[Any]] = {}
        for slot, actor in self._actors.items():
            # Half of a node's cores import at a time: who waits for us to be ready computes there too.
            cores = sum(s.n_cores for s in self._actors if s.node == slot.node)
            before, at_once = of_node.setdefault(slot.node, []), max(1, cores // 2)
            waits = slot.kind == "cpu" and len(before) >= at_once
            before.append(actor.ready.remote(slot, before[-at_once] if waits else None))
            self._ready.append(before[-1])

    def measured(self, max_seconds: float) -> Topology:
        """What `probe` returns, and raises."""
        return self._describe(_measure, max_seconds)

    def present(self, max_seconds: float) -> Topology:
        """The devices without their speeds: enough to place a plan that exists, not to make one.  Raises as `probe`."""
        return self._describe(lambda waiting, actors, ready: Topology(_devices(waiting, ready)[0]), max_seconds)

    def _describe(self, how: Callable[[_Waiting, Sequence[Any], Sequence[Any]], T], max_seconds: float) -> T:
        if self._missing:
            there = ", ".join(s.id for s in _live_slots(1))
            raise InvalidTopology(f"the live cluster has no device {self._missing[0]!r}; undivided, it has {there}")
        waiting = _Waiting(tuple(self._actors), max_seconds, time.monotonic() + max_seconds)
        try:
            return how(waiting, list(self._actors.values()), self._ready)
        except ray.exceptions.RayActorError as e:
            raise RuntimeFailure(f"a device was lost while the cluster was probed: {_first_line(e)}") from None

    def ask(self, function: Callable[..., Any], *arguments: Any, max_seconds: float = 60.0) -> dict[str, Any]:
        """What function(torch device, *arguments) gives on each device, at the same time.  Raises as `probe`."""

        def answers(waiting: _Waiting, actors: Sequence[Any], ready: Sequence[Any]) -> dict[str, Any]:
            asked = [a.answer.remote(function, *arguments) for a in actors]
            given = waiting(f"asking the devices for {function.__qualname__}", asked)
            return {s.id: value for s, value in zip(waiting.slots, given, strict=True)}

        return self._describe(answers, max_seconds)

    def keep(self, devices: Collection[Device]) -> dict[str, Any]:
        """The actors on those of `devices` that are CPUs, by id, are the caller's from now on; all others end.

        A GPU's ends in any case: it holds the GPU, which whoever runs there will reserve.
        """
        wanted = {(d.id, d.node) for d in devices if d.kind == "cpu"}
        kept = {s: a for s, a in self._actors.items() if (s.id, s.node) in wanted}
        self._actors = {s: a for s, a in self._actors.items() if s not in kept}
        self.close()
        return {s.id: a for s, a in kept.items()}

    def close(self) -> None:
        """Ends the actors that weren't kept.  Idempotent."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors = {}

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def live_nodes() -> dict[str, dict[str, Any]]:
    """The living nodes (entries of ray.nodes()) by the name that a Topology uses: see `names`."""
    living = [node for node in ray.nodes() if node["Alive"]]
    return dict(zip(names(living), living, strict=True))


def names(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A node is named by its nesa-node label, else by its host, else, where a host has several, by its Ray node id.

    So a plan is good for the next cluster of the same hosts.  Raises InvalidTopology when two would be called the same.
    """
    of_host = Counter(node["NodeManagerHostname"] for node in nodes)
    found: list[str] = []
    for node in nodes:
        host = node["NodeManagerHostname"]
        name = node["Labels"].get(NODE) or (host if of_host[host] == 1 else node["NodeID"])
        if name in found:
            raise InvalidTopology(f"{NODE}: two live nodes are called {name!r}")
        found.append(name)
    return found


@dataclass(frozen=True, slots=True)
class _Slot:
    """A device to be measured.

    cores    of the label; none without one
    cpus     Ray CPUs of its node
    part     which of how many equal parts of its node it is
    n_cores  how many cores it will have, if the node has as many as Ray CPUs
    """

    id: str
    kind: str
    node: str
    node_id: str
    memory_bytes: float
    cores: tuple[int, ...] = ()
    cpus: int = 0
    part: tuple[int, int] = (0, 1)
    niceness: int = 0

    @property
    def n_cores(self) -> int:
        return len(self.cores or part_of(range(self.cpus), *self.part)) if self.cpus else 0


class Probe:
    """The actor on one device.  Made without knowing which: `ready` tells it."""

    _server: LinkServer | None = None
    _meters: Mapping[str, Callable[[float], float]] = MappingProxyType({})

    def ready(self, slot: _Slot, after: object = None) -> tuple[tuple[str, int, bytes], tuple[int, ...], float]:
        """Pins itself.  Where its LinkServer listens, the cores it is pinned to, a GPU's free bytes (0 on a CPU).

        `after` is another's answer, that this one waits for.
        """
        first = sorted(os.sched_getaffinity(0))[: slot.cpus]
        cores = slot.cores or tuple(sorted(part_of(as_neighbours(first), *slot.part)))
        self._where = "cpu" if slot.kind == "cpu" else "cuda:0"
        with kept():
            pin(cores, slot.niceness)
            import torch

            torch.zeros(1, device=self._where)
        memory_bytes = free_memory(self._where) if self._where != "cpu" else 0.0
        self._server = LinkServer(ray.util.get_node_ip_address())
        return self._server.address, cores, memory_bytes

    def prepare(self, window_s: float) -> None:
        """Gets ready to measure its device."""
        self._meters = {"flops": flops_meter(self._where, window_s), "memory": memory_meter(self._where)}

    def measure(self, what: str, window_s: float) -> float:
        """Its device's flops or memory's bytes per second."""
        return self._meters[what](window_s)

    def answer(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives for its torch device."""
        return function(self._where, *arguments)

    def link(self, address: tuple[str, int, bytes], max_seconds: float) -> Link:
        return measure_link(address, max_seconds)

    def stop_measuring(self) -> None:
        """Its LinkServer listens no longer, and it holds nothing to measure with."""
        self._meters = {}
        if self._server is not None:
            self._server.close()


def _slots(name: str, node: Mapping[str, Any], parts: int = 1) -> list[_Slot]:
    resources, labels = node["Resources"], node["Labels"]
    gpus, cpus, memory = int(resources.get("GPU", 0)), int(resources.get("CPU", 0)), resources.get("memory", 0.0)
    niceness = labels.get(NICENESS, "0")
    if not niceness.isdecimal() or int(niceness) > 19:
        raise InvalidTopology(f"node {name}: {NICENESS}: needs 0 to 19, got {niceness!r}")
    if gpus:
        return [_Slot(f"{name}/gpu{i}", "gpu", name, node["NodeID"], 0.0) for i in range(gpus)]
    if not cpus:
        return []
    try:
        groups = label_to_cores(labels[CORES]) if CORES in labels else ((),) * parts
    except InvalidTopology as e:
        raise InvalidTopology(f"node {name}: {e}") from None
    ids = [f"{name}/cpu{i}" if CORES in labels or parts == 1 else f"{name}/cpu{i}of{parts}" for i in range(len(groups))]
    return [
        _Slot(
            id=identity,
            kind="cpu",
            node=name,
            node_id=node["NodeID"],
            memory_bytes=memory / len(groups),
            cores=cores,
            cpus=cpus,
            part=(i, parts),
            niceness=int(niceness),
        )
        for i, (identity, cores) in enumerate(zip(ids, groups, strict=True))
    ]


def _live_slots(devices: int | Collection[str]) -> list[_Slot]:
    nodes = dict(sorted(live_nodes().items()))
    parts = _parts(nodes, devices)
    slots = [s for name, node in nodes.items() for s in _slots(name, node, parts.get(name, 1))]
    if not slots:
        raise InvalidTopology("the live cluster has no node with a Ray CPU or a GPU")
    return slots if isinstance(devices, int) else [s for s in slots if s.id in devices]


def _parts(nodes: Mapping[str, Mapping[str, Any]], devices: int | Collection[str]) -> dict[str, int]:
    """Into how many devices each node is divided that no label divides: as many as it has Ray CPUs at most."""
    whole = {name: slots for name, node in nodes.items() if (slots := _slots(name, node))}
    cpus = {name: s[0].cpus for name, s in whole.items() if s[0].kind == "cpu" and not s[0].cores}
    parts = dict.fromkeys(cpus, 1)
    if not isinstance(devices, int):
        named = [(match[1], int(match[2])) for match in map(_PART.fullmatch, devices) if match]
        return parts | {name: n for name, n in named if n <= cpus.get(name, 0)}
    for _ in range(devices - sum(map(len, whole.values()))):
        largest = max(cpus, key=lambda name: cpus[name] / parts[name], default=None)
        if largest is None or parts[largest] == cpus[largest]:
            break
        parts[largest] += 1
    return parts


def as_actor(kind: type[Probe]) -> Any:
    """The Ray actor class of a Probe, whoever starts it: one that stays is like one that is made for its stage."""
    return ray.remote(max_restarts=0, max_concurrency=2)(kind)


def _actor(slot: _Slot, kind: type[Probe]) -> Any:
    return (
        as_actor(kind)
        .options(
            num_cpus=0,
            num_gpus=1 if slot.kind == "gpu" else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node_id, soft=False),
        )
        .remote()
    )


@dataclass(frozen=True)
class _Waiting:
    """For answers of actors, one on each slot, until the end."""

    slots: tuple[_Slot, ...]
    max_seconds: float
    end: float

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def __call__(self, what: str, calls: Sequence[Any]) -> list[Any]:
        """The answers.  Raises Timeout and RuntimeFailure, with what they are waited for."""
        try:
            return ray.get(list(calls), timeout=max(0.0, self.left_s))
        except ray.exceptions.GetTimeoutError:
            _, waiting = ray.wait(list(calls), num_returns=len(calls), timeout=0)
            late = ", ".join(s.id for s, c in zip(self.slots, calls, strict=False) if c in waiting) or len(waiting)
            raise Timeout(f"{what}: not done within {self.max_seconds:g} s; waiting for {late}") from None
        except ray.exceptions.RayTaskError as e:
            raise RuntimeFailure(f"{what}: {_first_line(e.cause)}") from None


def _devices(collect: _Waiting, starting: Sequence[Any]) -> tuple[tuple[Device, ...], list[Any]]:
    """The devices without their speeds, and where their LinkServers listen, as their actors' `ready` says."""
    ready = collect("starting the probes (is a GPU in use?)", starting)
    devices = tuple(
        Device(
            id=s.id,
            kind=s.kind,
            node=s.node,
            memory_bytes=memory_bytes or s.memory_bytes,
            cores=cores,
            niceness=s.niceness,
        )
        for s, (_, cores, memory_bytes) in zip(collect.slots, ready, strict=True)
    )
    return devices, [address for address, _, _ in ready]


def _measure(collect: _Waiting, actors: Sequence[Any], starting: Sequence[Any]) -> Topology:
    devices, addresses = _devices(collect, starting)
    window_s = min(0.6, max(0.05, collect.left_s / 20))
    collect("preparing to measure the devices", [a.prepare.remote(window_s / ROUNDS) for a in actors])
    rounds: list[list[float]] = []
    while len(rounds) < ROUNDS and not agree(rounds):
        rounds.append(
            collect("measuring the devices' flops", [a.measure.remote("flops", window_s / ROUNDS) for a in actors])
        )
    flops = [statistics.quantiles(several, n=4)[-1] for several in zip(*rounds, strict=True)]
    copies = collect("measuring the devices' memory", [a.measure.remote("memory", window_s / 4) for a in actors])
    devices = tuple(
        replace(device, flops_per_s=flops_per_s, memory_bytes_per_s=copied_per_s)
        for device, flops_per_s, copied_per_s in zip(
            devices, level(flops, devices), level(copies, devices), strict=True
        )
    )
    default, pairs = _links(collect, actors, addresses)
    return Topology(devices, default, pairs)


def agree(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether there are some, and each device was about as fast in the second best of them as in its best."""
    of_devices = [sorted(r) for r in zip(*rounds, strict=True)]
    return len(rounds) >= ENOUGH_ROUNDS and all(r[-1] <= ALIKE * r[-2] for r in of_devices)


def _links(
    collect: _Waiting, actors: Sequence[Any], addresses: Sequence[Any]
) -> tuple[Link, dict[frozenset[str], Link]]:
    """The slowest link inside a node, and every pair of nodes'; pairs without a common node at the same time."""
    at: dict[str, list[int]] = {}
    for i, s in enumerate(collect.slots):
        at.setdefault(s.node, []).append(i)
    rounds = tournament(sorted(at))
    share_s = link_share(len(rounds) + 1, collect.left_s)
    inside_s = min(share_s, INSIDE_S)
    inside = collect(
        "measuring the links inside nodes", [actors[m[0]].link.remote(addresses[m[-1]], inside_s) for m in at.values()]
    )
    default = Link(min(x.bytes_per_s for x in inside), max(x.latency_s for x in inside))
    pairs: dict[frozenset[str], Link] = {}
    for matches in rounds:
        calls = [actors[at[a][0]].link.remote(addresses[at[b][0]], share_s) for a, b in matches]
        names = ", ".join(f"{a} - {b}" for a, b in matches)
        links = collect(f"measuring the links {names}", calls)
        pairs.update({frozenset(match): link for match, link in zip(matches, links, strict=True)})
    return default, pairs


def link_share(rounds: int, seconds: float) -> float:
    """The most seconds for a link, of a number of rounds that should take LINKS_S together and a part of `seconds`.

    Links of short round trips take less.
    """
    return min(LINK_S, max(0.05, min(LINKS_S, 0.8 * seconds) / rounds))


def tournament(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every pair once, in rounds that use each name at most once (the circle method: n - 1 rounds, n if n is odd)."""
    ring: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    rounds = []
    for _ in range(len(ring) - 1):
        pairs = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        matches = [(a, b) for a, b in pairs if a is not None and b is not None]
        if matches:
            rounds.append(matches)
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
