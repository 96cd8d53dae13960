"""Preparation: a Graph and a Topology as the arrays the planner works on.

What must stay together becomes one *item*: colocation classes, the strongly connected sets that colocation makes of
them, and nodes that cost nothing where putting them with their only neighbour is never worse.  A *tensor* is one
producer's output with all the items that consume it (a hyperedge).  A *unit* is what a stage runs on: one device, or
the `replicas` devices that share it.
"""

# mypy: disable-error-code="var-annotated,no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.plan import Stage, within_s_per_byte


@dataclass(frozen=True, eq=False)
class Problem:
    """Arrays over n items, T tensors, U units, K device types and P places.

    members            node positions of each item, in the graph's order
    time_s             [K, n] seconds of an item on a device type; inf where it can't run
    memory_bytes       [n]
    after, before      precedence among items, as (pointer, index) pairs
    producer           [T] item that makes the tensor
    tensor_bytes       [T]
    pins               (pointer, item) the items that consume each tensor, its producer left out
    outputs, inputs    (pointer, tensor) by producing and by consuming item
    units              devices of each unit
    unit_types         (pointer, type) device types in each unit
    capacity_bytes     [U] memory of the unit's smallest device
    place              [U] index of the hosts the unit sits on
    free               [U] the unit pays no transfers
    latency_s          [P, P] of the slowest link between two places
    s_per_byte         [P, P]
    """

    graph: Graph
    topology: Topology
    members: tuple[tuple[int, ...], ...]
    time_s: np.ndarray
    memory_bytes: np.ndarray
    after: tuple[np.ndarray, np.ndarray]
    before: tuple[np.ndarray, np.ndarray]
    producer: np.ndarray
    tensor_bytes: np.ndarray
    pins: tuple[np.ndarray, np.ndarray]
    outputs: tuple[np.ndarray, np.ndarray]
    inputs: tuple[np.ndarray, np.ndarray]
    units: tuple[tuple[str, ...], ...]
    unit_types: tuple[np.ndarray, np.ndarray]
    capacity_bytes: np.ndarray
    place: np.ndarray
    free: np.ndarray
    latency_s: np.ndarray
    s_per_byte: np.ndarray

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.members)

    @property
    def one_link(self) -> bool:
        """All transfers between units take the same time."""
        return bool(np.ptp(self.latency_s) == 0 and np.ptp(self.s_per_byte) == 0)

    def unit_time_s(self, unit: int) -> np.ndarray:
        """[types of the unit, n] seconds."""
        start, stop = self.unit_types[0][unit : unit + 2]
        return self.time_s[self.unit_types[1][start:stop]]

    def unit_class(self, unit: int) -> tuple:
        """Units with the same value are interchangeable."""
        start, stop = self.unit_types[0][unit : unit + 2]
        where = -1 if self.one_link else int(self.place[unit])
        types = tuple(self.unit_types[1][start:stop].tolist())
        return (types, float(self.capacity_bytes[unit]), where, bool(self.free[unit]))

    def stages(self, unit_of: np.ndarray, order: Sequence[int]) -> tuple[Stage, ...]:
        """Stages for an assignment item -> unit; stage ids follow the first appearance of a unit in `order`."""
        nodes: dict[int, list[int]] = {}
        for item in order:
            nodes.setdefault(int(unit_of[item]), []).extend(self.members[item])
        ids = [n.id for n in self.graph.nodes]
        return tuple(
            Stage(id=i, devices=self.units[u], nodes=tuple(ids[p] for p in sorted(positions)))
            for i, (u, positions) in enumerate(nodes.items())
        )


def prepare(
    graph: Graph,
    topology: Topology,
    units: Sequence[tuple[str, ...]],
    *,
    forward_only: bool = False,
    contract: bool = True,
    reduction: float = 0.0,
) -> Problem:
    """Compiles the problem of placing `graph` on `units`; raises Infeasible when one item fits no unit.

    `forward_only` leaves out what backward nodes send and receive (the latency of a sample is of its forward pass).
    Without `contract`, only what must stay together becomes one item: a fixed number of stages may need every node.
    `reduction` is the bytes that a replica moves per parameter byte; their time counts as compute of the unit.
    """
    devices = topology.device
    types, unit_types = _device_types(topology, units, reduction)
    trained = np.array([n.trained_bytes for n in graph.nodes])
    node_time_s = np.array([_node_times(graph, t) + sync * trained for t, sync in types])
    node_memory = np.array([n.memory_bytes for n in graph.nodes])
    places: dict[frozenset[str], int] = {}
    place = np.array([places.setdefault(frozenset(devices[d].node for d in u), len(places)) for u in units])
    latency_s, s_per_byte = _links(topology, list(places), place)

    item_of = _contract_cycles(graph)
    if contract:
        uniform = bool(np.ptp(latency_s) == 0 and np.ptp(s_per_byte) == 0)
        item_of = _contract_free(graph, item_of, node_time_s, node_memory, uniform=uniform)
    members = _members(item_of)
    n = len(members)
    time_s = np.zeros((len(types), n))
    for k in range(len(types)):
        np.add.at(time_s[k], item_of, node_time_s[k])
    memory = np.zeros(n)
    np.add.at(memory, item_of, node_memory)

    position = {node.id: i for i, node in enumerate(graph.nodes)}
    producer, sizes, pins = _tensors(graph, position, item_of, forward_only)
    precedence = {
        (int(item_of[position[u]]), int(item_of[position[v]]))
        for u, v in graph.edges
        if not graph.node[u].backward and not graph.node[v].backward
    }
    pairs = sorted((a, b) for a, b in precedence if a != b)
    problem = Problem(
        graph=graph,
        topology=topology,
        members=members,
        time_s=time_s,
        memory_bytes=memory,
        **data_flow(n, pairs, producer, sizes, pins),
        units=tuple(units),
        unit_types=grouped(len(units), unit_types),
        capacity_bytes=np.array([min(devices[d].memory_bytes for d in u) for u in units]),
        place=place,
        free=np.array([all(devices[d].free_transfer for d in u) for u in units]),
        latency_s=latency_s,
        s_per_byte=s_per_byte,
    )
    _check_feasible(problem)
    return problem


def data_flow(
    n: int, pairs: Sequence[tuple[int, int]], producer: Sequence[int], sizes: Sequence[float], pins: Sequence[list[int]]
) -> dict[str, Any]:
    """Problem's fields of precedence and tensors: `pairs` of items, each tensor's producer, bytes and consumers."""
    uses = [(t, c) for t, consumers in enumerate(pins) for c in consumers]
    return {
        "after": grouped(n, pairs),
        "before": grouped(n, [(b, a) for a, b in pairs]),
        "producer": np.array(producer, dtype=np.int64),
        "tensor_bytes": np.array(sizes, dtype=np.float64),
        "pins": grouped(len(pins), uses),
        "outputs": grouped(n, [(p, t) for t, p in enumerate(producer)]),
        "inputs": grouped(n, [(c, t) for t, c in uses]),
    }


def grouped(groups: int, pairs: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(pointer, values): the second elements of `pairs` by their first, in the given order."""
    pointer = np.zeros(groups + 1, dtype=np.int64)
    if not pairs:
        return pointer, np.zeros(0, dtype=np.int64)
    table = np.array(pairs, dtype=np.int64)
    np.cumsum(np.bincount(table[:, 0], minlength=groups), out=pointer[1:])
    return pointer, table[np.argsort(table[:, 0], kind="stable"), 1]


def _device_types(
    topology: Topology, units: Sequence[tuple[str, ...]], reduction: float
) -> tuple[list[tuple[Device, float]], list[tuple[int, int]]]:
    """(device, sync seconds per parameter byte) of each type, and the (unit, type) pairs."""
    types: dict[tuple, int] = {}
    examples: list[tuple[Device, float]] = []
    pairs = set()
    for u, members in enumerate(units):
        sync = reduction * len(members) * within_s_per_byte(topology, members) if reduction else 0.0
        for d in (topology.device[m] for m in members):
            key = (d.kind, d.flops_per_s, d.memory_bytes_per_s, d.speed, sync)
            if key not in types:
                types[key] = len(types)
                examples.append((d, sync))
            pairs.add((u, types[key]))
    return examples, sorted(pairs)


def _node_times(graph: Graph, device: Device) -> np.ndarray:
    """What plan.node_seconds answers for each node, at once."""
    flops = np.array([n.flops for n in graph.nodes])
    access = np.array([n.access_bytes for n in graph.nodes])
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.where(flops > 0, flops / device.flops_per_s if device.flops_per_s else np.inf, 0.0)
        if device.memory_bytes_per_s:
            seconds = np.maximum(seconds, access / device.memory_bytes_per_s)
    stated = [(i, n.compute_s.get(device.kind, np.inf)) for i, n in enumerate(graph.nodes) if n.compute_s]
    if stated:
        where, times = zip(*stated, strict=True)
        seconds[list(where)] = np.array(times) / device.speed
    return seconds


def _links(topology: Topology, places: list[frozenset[str]], place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slowest latency and seconds per byte between places; a pair that no two units form repeats another's."""
    p = len(places)
    latency, inverse = np.zeros((p, p)), np.zeros((p, p))
    units_at = np.bincount(place, minlength=p)
    real = np.zeros((p, p), dtype=bool)
    for a in range(p):
        for b in range(a, p):
            links = [topology.link(x, y) for x in places[a] for y in places[b]]
            latency[a, b] = latency[b, a] = max(link.latency_s for link in links)
            inverse[a, b] = inverse[b, a] = max(1 / link.bytes_per_s for link in links)
            real[a, b] = real[b, a] = a != b or units_at[a] > 1
    if real.any() and not real.all():
        some = tuple(np.argwhere(real)[0])
        latency[~real], inverse[~real] = latency[some], inverse[some]
    return latency, inverse


def _contract_cycles(graph: Graph) -> np.ndarray:
    """Item of each node: colocation classes, merged while they form cycles among forward nodes."""
    position = {n.id: i for i, n in enumerate(graph.nodes)}
    first: dict[object, int] = {}
    label = [i if n.colocate is None else first.setdefault(n.colocate, i) for i, n in enumerate(graph.nodes)]
    after: dict[int, list[int]] = {i: [] for i in label}
    for u, v in graph.edges:
        a, b = label[position[u]], label[position[v]]
        if a != b and not graph.node[u].backward and not graph.node[v].backward:
            after[a].append(b)
    component = strongly_connected(after)
    return _dense([component[i] for i in label])


def strongly_connected(after: dict[int, list[int]]) -> dict[int, int]:
    """The component of each vertex, named by one of its members (Tarjan 1972, without recursion)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    component: dict[int, int] = {}
    path: list[int] = []
    for root in after:
        if root in index:
            continue
        work = [(root, 0)]
        while work:
            v, i = work.pop()
            if v not in index:
                index[v] = low[v] = len(index)
                path.append(v)
            children = after[v]
            while i < len(children) and children[i] in index:
                if children[i] not in component:
                    low[v] = min(low[v], low[children[i]])
                i += 1
            if i < len(children):
                work += [(v, i), (children[i], 0)]
                continue
            if low[v] == index[v]:
                while v not in component:
                    component[path.pop()] = v
    return component


def _contract_free(
    graph: Graph, item_of: np.ndarray, time_s: np.ndarray, memory: np.ndarray, *, uniform: bool
) -> np.ndarray:
    """Puts an item that costs nothing with its only neighbour, where that is never worse.

    A sink joins its only source of data, a source its only consumer.  With one kind of link, an item whose output
    is no bigger than its only input, which nobody else consumes, joins the producer of that input.
    """
    n = int(item_of.max()) + 1
    position = {node.id: i for i, node in enumerate(graph.nodes)}
    cost = np.zeros(n)
    np.add.at(cost, item_of, time_s.max(axis=0) + memory)
    before: list[set[int]] = [set() for _ in range(n)]
    after: list[set[int]] = [set() for _ in range(n)]
    biggest = np.zeros(n)
    tensors = np.zeros(n, dtype=np.int64)
    smallest = np.full(n, np.inf)
    for u, consumers in graph.successors.items():
        a = int(item_of[position[u]])
        out = {int(item_of[position[v]]) for v in consumers} - {a}
        for b in out:
            after[a].add(b)
            before[b].add(a)
        if out:
            size = graph.node[u].output_bytes
            biggest[a], smallest[a] = max(biggest[a], size), min(smallest[a], size)
            tensors[a] += 1
    target = list(range(n))

    def merge(v: int, u: int) -> None:
        """Item v becomes part of its neighbour u."""
        target[v] = u
        before[u].discard(v)
        after[u].discard(v)
        for w in before[v] - {u}:
            after[w].discard(v)
            after[w].add(u)
            before[u].add(w)
        for w in after[v] - {u}:
            before[w].discard(v)
            before[w].add(u)
            after[u].add(w)

    work = [v for v in range(n) if cost[v] == 0]
    queued = set(work)
    while work:
        v = work.pop()
        queued.discard(v)
        if target[v] != v:
            continue
        joined = -1
        if not after[v] and len(before[v]) == 1:
            joined = next(iter(before[v]))
            merge(v, joined)
        elif not before[v] and len(after[v]) == 1:
            joined = next(iter(after[v]))
            merge(v, joined)
        elif uniform and len(before[v]) == 1:
            u = next(iter(before[v]))
            if after[u] == {v} and u not in after[v] and tensors[u] == tensors[v] == 1 and biggest[v] <= smallest[u]:
                merge(v, u)
                joined = u
                biggest[u], smallest[u], tensors[u] = biggest[v], smallest[v], tensors[v]
        if joined >= 0:
            for w in {joined} | before[joined] | after[joined]:
                if cost[w] == 0 and w not in queued:
                    queued.add(w)
                    work.append(w)

    def root(v: int) -> int:
        while target[v] != v:
            v = target[v]
        return v

    return _dense([root(int(i)) for i in item_of])


def _dense(labels: Sequence[int]) -> np.ndarray:
    """The labels renamed 0, 1, … in the order they appear."""
    seen: dict[int, int] = {}
    return np.array([seen.setdefault(x, len(seen)) for x in labels], dtype=np.int64)


def _members(item_of: np.ndarray) -> tuple[tuple[int, ...], ...]:
    members: list[list[int]] = [[] for _ in range(int(item_of.max()) + 1)]
    for i, item in enumerate(item_of.tolist()):
        members[item].append(i)
    return tuple(tuple(m) for m in members)


def _tensors(
    graph: Graph, position: dict, item_of: np.ndarray, forward_only: bool
) -> tuple[list[int], list[float], list[list[int]]]:
    producer: list[int] = []
    sizes: list[float] = []
    pins: list[list[int]] = []
    for u, consumers in graph.successors.items():
        a = int(item_of[position[u]])
        if forward_only:
            consumers = () if graph.node[u].backward else tuple(v for v in consumers if not graph.node[v].backward)
        out = sorted({int(item_of[position[v]]) for v in consumers} - {a})
        if out and graph.node[u].output_bytes:
            producer.append(a)
            sizes.append(graph.node[u].output_bytes)
            pins.append(out)
    return producer, sizes, pins


def _check_feasible(problem: Problem) -> None:
    """Raises Infeasible for an item that no unit can run or hold, and for a graph bigger than all units."""
    runs = np.zeros(problem.n, dtype=bool)
    fits = np.zeros(problem.n)
    for u in range(len(problem.units)):
        here = np.isfinite(problem.unit_time_s(u)).all(axis=0)
        runs |= here
        fits = np.where(here, np.maximum(fits, problem.capacity_bytes[u]), fits)
    names = [f"node {node.id}" for node in problem.graph.nodes]
    if not runs.all():
        item = problem.members[int(np.argmin(runs))]
        kinds = sorted({problem.topology.device[d].kind for u in problem.units for d in u})
        what = names[item[0]] if len(item) == 1 else f"{len(item)} nodes that share a stage, {names[item[0]]} first,"
        raise Infeasible(f"{what} can run on no device; the cluster has kinds {', '.join(kinds)}")
    bad = problem.memory_bytes > fits * (1 + 1e-9)
    if bad.any():
        i = int(np.argmax(problem.memory_bytes - fits))
        item = problem.members[i]
        what = names[item[0]] if len(item) == 1 else f"{len(item)} nodes that share a stage, {names[item[0]]} first,"
        raise Infeasible(
            f"memory: {what} needs {problem.memory_bytes[i]:.0f} bytes; the largest device that can run it has "
            f"{fits[i]:.0f}"
        )
    needed, there = problem.memory_bytes.sum(), problem.capacity_bytes.sum()
    if needed > there * (1 + 1e-9):
        raise Infeasible(f"memory: the graph needs {needed:.0f} bytes, all devices together have {there:.0f}")
