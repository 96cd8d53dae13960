"""Plan: which nodes run on which devices, what that costs, and how far it can be from the best.

The cost of a stage is the objective of MTPP (arXiv 2311.03703) and of Tarnawski et al. (arXiv 2006.16423):
receive + compute + send, each tensor counted once per (producer, consuming stage) on receive, and on send once,
by its slowest transfer, however many stages consume it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import InvalidPlan
from nesa_ray.fields import Fields, read_json, write_json
from nesa_ray.graph.graph import Graph, Node, NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Nodes that run together on each of `devices` (its data-parallel replicas).  Times are of one micro-batch.

    sync_s  what keeping the replicas' parameters equal takes, per micro-batch (training only)
    """

    id: int
    devices: tuple[str, ...]
    nodes: tuple[NodeId, ...]
    compute_s: float = 0.0
    send_s: float = 0.0
    receive_s: float = 0.0
    memory_bytes: float = 0.0
    sync_s: float = 0.0
    overlap: bool = False

    @property
    def cost_s(self) -> float:
        """Seconds a replica is busy with one micro-batch."""
        if self.overlap:
            return max(self.receive_s, self.compute_s, self.send_s)
        return self.receive_s + self.compute_s + self.send_s

    @property
    def period_s(self) -> float:
        """Seconds between micro-batches that the stage's replicas sustain together."""
        return self.cost_s / len(self.devices) + self.sync_s


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A partition with its predicted costs.  `bound_by` says which proof gave `lower_bound_s`."""

    objective: str
    stages: tuple[Stage, ...]
    bottleneck_s: float
    latency_s: float
    lower_bound_s: float
    planning_s: float = 0.0
    mode: str = "inference"
    overlap: bool = False
    proved_optimal: bool = False
    bound_by: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def objective_s(self) -> float:
        """What the plan minimises: the bottleneck for throughput, the end-to-end time for latency."""
        return self.latency_s if self.objective == "latency" else self.bottleneck_s

    @property
    def gap(self) -> float:
        """Objective / lower bound - 1: no plan is better than this one by more."""
        if self.objective_s <= self.lower_bound_s:
            return 0.0
        return self.objective_s / self.lower_bound_s - 1 if self.lower_bound_s else float("inf")

    @property
    def replicas(self) -> int:
        """Devices of the most replicated stage."""
        return max((len(s.devices) for s in self.stages), default=1)

    @cached_property
    def stage_of(self) -> Mapping[NodeId, int]:
        """Stage id of each node."""
        return {n: s.id for s in self.stages for n in s.nodes}

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices the plan uses, stage by stage."""
        return tuple(d for s in self.stages for d in s.devices)

    def to_dict(self) -> dict[str, Any]:
        """The contract's plan.json."""
        return {
            "version": 1,
            "objective": self.objective,
            "mode": self.mode,
            "overlap": self.overlap,
            "bottleneck_s": self.bottleneck_s,
            "latency_s": self.latency_s,
            "lower_bound_s": self.lower_bound_s,
            "bound_by": self.bound_by,
            "gap": self.gap if self.gap != float("inf") else None,
            "proved_optimal": self.proved_optimal,
            "planning_s": self.planning_s,
            **({"extra": dict(self.extra)} if self.extra else {}),
            "stages": [
                {
                    "id": s.id,
                    "devices": list(s.devices),
                    "nodes": list(s.nodes),
                    "compute_s": s.compute_s,
                    "send_s": s.send_s,
                    "receive_s": s.receive_s,
                    "memory_bytes": s.memory_bytes,
                    **({"sync_s": s.sync_s} if s.sync_s else {}),
                }
                for s in self.stages
            ],
        }

    @classmethod
    def from_dict(cls, value: Any) -> Plan:
        """Reads the contract's plan.json; raises InvalidPlan."""
        known = Fields(value, "plan", InvalidPlan)
        overlap = known.flag("overlap")
        stages = []
        for i, s in enumerate(known.items("stages")):
            one = Fields(s, f"stages[{i}]", InvalidPlan)
            stages.append(
                Stage(
                    id=int(one.number("id")),
                    devices=tuple(str(d) for d in one.items("devices")),
                    nodes=tuple(one.items("nodes")),
                    overlap=overlap,
                    **{n: one.number(n, 0.0) for n in ("compute_s", "send_s", "receive_s", "memory_bytes", "sync_s")},
                )
            )
        return cls(
            objective=known.text("objective", "throughput"),
            mode=known.text("mode", "inference"),
            overlap=overlap,
            stages=tuple(stages),
            proved_optimal=known.flag("proved_optimal"),
            bound_by=known.text("bound_by", ""),
            extra=dict(known.value.get("extra") or {}),
            **{n: known.number(n, 0.0) for n in ("bottleneck_s", "latency_s", "lower_bound_s", "planning_s")},
        )

    @classmethod
    def from_json(cls, path: str | Path) -> Plan:
        """Reads a file; raises InvalidPlan."""
        return cls.from_dict(read_json(path, InvalidPlan))

    def to_json(self, path: str | Path) -> None:
        """Writes a file."""
        write_json(path, self.to_dict())

    def check(self, graph: Graph, topology: Topology) -> None:
        """Raises InvalidPlan unless every node is in one stage, the stage graph is acyclic and memory fits."""
        check_assignment(graph, topology, self.stages)


def node_seconds(node: Node, device: Device) -> float | None:
    """Seconds of one node on a device; None where it can't run.

    Measured time if there is one, else the roofline (Williams et al. 2009): the longer of computing and moving bytes.
    """
    if node.compute_s:
        stated = node.compute_s.get(device.kind)
        return None if stated is None else stated / device.speed
    if node.flops and not device.flops_per_s:
        return None
    compute_s = node.flops / device.flops_per_s if node.flops else 0.0
    if node.access_bytes and device.memory_bytes_per_s:
        return max(compute_s, node.access_bytes / device.memory_bytes_per_s)
    return compute_s


def stage_graph(graph: Graph, stage_of: Mapping[NodeId, int]) -> dict[int, set[int]]:
    """The quotient of the forward graph by stages: stage -> the stages that consume its tensors."""
    quotient: dict[int, set[int]] = {s: set() for s in stage_of.values()}
    for u, v in graph.edges:
        a, b = stage_of[u], stage_of[v]
        if a != b and not graph.node[u].backward and not graph.node[v].backward:
            quotient[a].add(b)
    return quotient


def topological_stages(quotient: Mapping[int, set[int]]) -> list[int] | None:
    """Stage ids in an order that follows the data, or None when the stage graph has a cycle."""
    waiting = dict.fromkeys(quotient, 0)
    for after in quotient.values():
        for s in after:
            waiting[s] += 1
    ready = sorted((s for s, n in waiting.items() if not n), reverse=True)
    order: list[int] = []
    while ready:
        s = ready.pop()
        order.append(s)
        for t in sorted(quotient[s], reverse=True):
            waiting[t] -= 1
            if not waiting[t]:
                ready.append(t)
    return order if len(order) == len(quotient) else None


def check_assignment(graph: Graph, topology: Topology, stages: tuple[Stage, ...]) -> None:
    """Raises InvalidPlan, naming the stage and what was needed, unless `stages` is a valid plan."""
    stage_of: dict[NodeId, int] = {}
    used: dict[str, int] = {}
    for s in stages:
        if not s.devices:
            raise InvalidPlan(f"stage {s.id}: devices: needs at least one")
        for d in s.devices:
            if d not in topology.device:
                raise InvalidPlan(f"stage {s.id}: devices: the cluster has no device {d!r}")
            if d in used:
                raise InvalidPlan(f"stage {s.id}: devices: {d!r} already runs stage {used[d]}")
            used[d] = s.id
        for n in s.nodes:
            if n not in graph.node:
                raise InvalidPlan(f"stage {s.id}: nodes: the graph has no node {n!r}")
            if n in stage_of:
                raise InvalidPlan(f"stage {s.id}: nodes: node {n} is already in stage {stage_of[n]}")
            stage_of[n] = s.id
    missing = [n.id for n in graph.nodes if n.id not in stage_of]
    if missing:
        raise InvalidPlan(f"stages: {len(missing)} nodes are in no stage, the first is {missing[0]}")
    together: dict[NodeId, int] = {}
    for node in graph.nodes:
        if node.colocate is not None and together.setdefault(node.colocate, stage_of[node.id]) != stage_of[node.id]:
            raise InvalidPlan(f"node {node.id}: colocate {node.colocate!r} is split over two stages")
    for s in stages:
        needed = sum(graph.node[n].memory_bytes for n in s.nodes)
        for d in s.devices:
            device = topology.device[d]
            for n in s.nodes:
                if node_seconds(graph.node[n], device) is None:
                    raise InvalidPlan(f"stage {s.id}: node {n} can't run on {d} (kind {device.kind!r})")
            if needed > device.memory_bytes * (1 + 1e-9):
                raise InvalidPlan(f"stage {s.id}: needs {needed:.0f} bytes, {d} has {device.memory_bytes:.0f}")
    if topological_stages(stage_graph(graph, stage_of)) is None:
        raise InvalidPlan("stages: the stage graph has a cycle")


def cost_stages(
    graph: Graph, topology: Topology, stages: tuple[Stage, ...], *, overlap: bool = False, reduction: float = 0.0
) -> tuple[Stage, ...]:
    """The stages with compute, send, receive, memory and sync filled in (see the top of the file).

    A replicated stage counts its slowest device, and the slowest link between any replica and its peers.  `reduction`
    is the bytes a replica moves per parameter byte and micro-batch (costing.reduction_factor).
    """
    stage_of = {n: s.id for s in stages for n in s.nodes}
    replicas = {s.id: [topology.device[d] for d in s.devices] for s in stages}
    receive = dict.fromkeys(replicas, 0.0)
    send = dict.fromkeys(replicas, 0.0)

    def pays(stage: int) -> bool:
        return not all(d.free_transfer for d in replicas[stage])

    for u, consumers in graph.successors.items():
        node, a = graph.node[u], stage_of[u]
        out = {stage_of[v] for v in consumers} - {a}
        if not out or not node.output_bytes:
            continue
        wires = {
            b: max(topology.link(x.node, y.node).seconds(node.output_bytes) for x in replicas[a] for y in replicas[b])
            for b in out
        }
        for b, seconds in wires.items():
            if pays(b):
                receive[b] += seconds
        if pays(a):
            send[a] += max(wires.values())
    return tuple(
        replace(
            s,
            compute_s=max(sum(node_seconds(graph.node[n], d) or 0.0 for n in s.nodes) for d in replicas[s.id]),
            send_s=send[s.id],
            receive_s=receive[s.id],
            memory_bytes=sum(graph.node[n].memory_bytes for n in s.nodes),
            sync_s=reduction
            * sum(graph.node[n].trained_bytes for n in s.nodes)
            * within_s_per_byte(topology, s.devices),
            overlap=overlap,
        )
        for s in stages
    )


def within_s_per_byte(topology: Topology, devices: tuple[str, ...]) -> float:
    """Seconds a byte takes over the slowest link between two of the devices; 0 for a single one."""
    hosts = [topology.device[d].node for d in devices]
    links = [topology.link(a, b) for i, a in enumerate(hosts) for b in hosts[:i]]
    return max((1 / link.bytes_per_s for link in links), default=0.0)


def latency_seconds(graph: Graph, topology: Topology, stages: tuple[Stage, ...]) -> float:
    """End-to-end time of one sample: the longest path of compute and transfers through the stage DAG."""
    stage_of = {n: s.id for s in stages for n in s.nodes}
    by_id = {s.id: s for s in stages}
    order = topological_stages(stage_graph(graph, stage_of))
    if order is None:
        raise InvalidPlan("stages: the stage graph has a cycle")
    arrivals: dict[int, list[tuple[int, float]]] = {s: [] for s in by_id}
    wires: dict[tuple[int, int], float] = {}
    for u, consumers in graph.successors.items():
        node, a = graph.node[u], stage_of[u]
        if node.backward or not node.output_bytes:
            continue
        for b in {stage_of[v] for v in consumers if not graph.node[v].backward} - {a}:
            ends = [[topology.device[d] for d in by_id[s].devices] for s in (a, b)]
            free = any(all(d.free_transfer for d in end) for end in ends)
            wire = max(topology.link(x.node, y.node).seconds(node.output_bytes) for x in ends[0] for y in ends[1])
            wires[a, b] = wires.get((a, b), 0.0) + (0.0 if free else wire)
    for (a, b), seconds in wires.items():
        arrivals[b].append((a, seconds))
    for a, after in stage_graph(graph, stage_of).items():
        for b in after:
            if (a, b) not in wires:
                arrivals[b].append((a, 0.0))
    finish: dict[int, float] = {}
    for s in order:
        start = max((finish[a] + seconds for a, seconds in arrivals[s]), default=0.0)
        finish[s] = start + by_id[s].compute_s
    return max(finish.values())
