"""A model's computation as nodes with costs and edges of data flow.  No torch here."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nesa_ray.errors import InvalidGraph
from nesa_ray.fields import Fields, read_json, write_json

NodeId = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operator.

    compute_s     seconds on each kind of device; when empty, the time is flops / the device's flops_per_s
    flops         floating point operations of one micro-batch
    param_bytes   bytes of the parameters it owns
    frozen_bytes  of these, what isn't trained: without gradient, without optimizer state
    output_bytes  bytes of its output, what an edge that is cut carries
    saved_bytes   bytes it keeps from forward to backward
    access_bytes  bytes it reads and writes, for the roofline; 0 = unknown
    cache_bytes   bytes it keeps of each token of context when serving (keys and values)
    memory_bytes  bytes it holds resident; 0 lets the cost model derive it
    backward      belongs to the backward pass: outside the acyclicity rule
    colocate      nodes with the same value share a stage
    """

    id: NodeId
    name: str = ""
    op: str = ""
    compute_s: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0.0
    param_bytes: float = 0.0
    frozen_bytes: float = 0.0
    output_bytes: float = 0.0
    saved_bytes: float = 0.0
    access_bytes: float = 0.0
    cache_bytes: float = 0.0
    memory_bytes: float = 0.0
    backward: bool = False
    colocate: NodeId | None = None

    @property
    def trained_bytes(self) -> float:
        """Bytes of the parameters that are trained."""
        return max(0.0, self.param_bytes - self.frozen_bytes)

    @classmethod
    def from_dict(cls, value: Any, position: int) -> Node:
        """Reads one entry of graph.json's `nodes`; raises InvalidGraph."""
        known = Fields(value, f"nodes[{position}]", InvalidGraph)
        identity = known.identifier()
        known.where = f"node {identity}"
        known.only(_NODE_FIELDS)
        colocate = None if known.value.get("colocate") is None else known.identifier("colocate")
        return cls(
            id=identity,
            name=known.text("name", ""),
            op=known.text("op", ""),
            compute_s=known.numbers("compute_s"),
            backward=known.flag("backward"),
            colocate=colocate,
            **{name: known.number(name, 0.0) for name in _NODE_NUMBERS},
        )

    def to_dict(self) -> dict[str, Any]:
        """The entry of graph.json, without fields at their default."""
        out: dict[str, Any] = {"id": self.id}
        for name in _NODE_FIELDS[1:]:
            value = getattr(self, name)
            if value or (name == "colocate" and value is not None):
                out[name] = dict(value) if name == "compute_s" else value
        return out


_NODE_FIELDS = tuple(f.name for f in fields(Node))
_NODE_NUMBERS = ("flops", "param_bytes", "output_bytes", "saved_bytes", "access_bytes", "cache_bytes", "memory_bytes")


@dataclass(frozen=True)
class Graph:
    """Operators and data flow.  Immutable; checked when made.

    Raises InvalidGraph for a repeated id or name, an edge to an unknown node, or a cycle among forward nodes.
    """

    nodes: tuple[Node, ...]
    edges: tuple[tuple[NodeId, NodeId], ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if not self.nodes:
            raise InvalidGraph("nodes: the graph is empty, needs at least one node")
        ids, names = set(), set()
        for n in self.nodes:
            if n.id in ids:
                raise InvalidGraph(f"node {n.id}: id is used twice")
            if n.name and n.name in names:
                raise InvalidGraph(f"node {n.id}: name {n.name!r} is used twice")
            ids.add(n.id)
            names.add(n.name)
        for u, v in self.edges:
            for end in (u, v):
                if end not in ids:
                    raise InvalidGraph(f"edge [{u}, {v}]: no node has id {end!r}")
        self.order  # noqa: B018 - raises on a cycle

    @cached_property
    def node(self) -> Mapping[NodeId, Node]:
        """Nodes by id."""
        return {n.id: n for n in self.nodes}

    @cached_property
    def order(self) -> tuple[NodeId, ...]:
        """Forward nodes in a topological order that keeps to the given order where it can (Kahn 1962)."""
        forward = {n.id for n in self.nodes if not n.backward}
        after: dict[NodeId, list[NodeId]] = {i: [] for i in forward}
        waiting = dict.fromkeys(forward, 0)
        for u, v in set(self.edges):
            if u in forward and v in forward:
                after[u].append(v)
                waiting[v] += 1
        position = {n.id: i for i, n in enumerate(self.nodes)}
        ready = [position[i] for i in forward if not waiting[i]]
        heapq.heapify(ready)
        done: list[NodeId] = []
        while ready:
            u = self.nodes[heapq.heappop(ready)].id
            done.append(u)
            for v in after[u]:
                waiting[v] -= 1
                if not waiting[v]:
                    heapq.heappush(ready, position[v])
        if len(done) < len(forward):
            left = {i for i in forward if waiting[i]}
            raise InvalidGraph(f"edges: the graph has a cycle: {_some_cycle(left, self.edges)}")
        return tuple(done)

    @cached_property
    def successors(self) -> Mapping[NodeId, tuple[NodeId, ...]]:
        """Consumers of each node, without repetition, in the order of `edges`."""
        after: dict[NodeId, dict[NodeId, None]] = {n.id: {} for n in self.nodes}
        for u, v in self.edges:
            after[u][v] = None
        return {i: tuple(vs) for i, vs in after.items()}

    def with_nodes(self, nodes: Iterable[Node]) -> Graph:
        """The same data flow with other nodes (the same ids)."""
        return replace(self, nodes=tuple(nodes))

    @classmethod
    def from_dict(cls, value: Any) -> Graph:
        """Reads the contract's graph.json; raises InvalidGraph."""
        known = Fields(value, "graph", InvalidGraph)
        known.only(("version", "name", "nodes", "edges"))
        if known.number("version", 1) != 1:
            raise known.fail("version", f"needs 1, got {known.value['version']}")
        nodes = tuple(Node.from_dict(n, i) for i, n in enumerate(known.items("nodes")))
        edges = []
        for i, e in enumerate(known.items("edges", required=False)):
            if (
                not isinstance(e, list | tuple)
                or len(e) != 2
                or any(isinstance(x, bool) or not isinstance(x, int | str) for x in e)
            ):
                raise InvalidGraph(f"edges[{i}]: needs a pair of node ids, got {e!r:.60}")
            edges.append((e[0], e[1]))
        return cls(nodes, tuple(edges), known.text("name", ""))

    def to_dict(self) -> dict[str, Any]:
        """The contract's graph.json."""
        return {
            "version": 1,
            "name": self.name,
            "nodes": [n.to_dict() for n in self.nodes],
            "edges": [list(e) for e in self.edges],
        }

    @classmethod
    def from_json(cls, path: str | Path) -> Graph:
        """Reads a file; raises InvalidGraph naming the file and the field."""
        value = read_json(path, InvalidGraph)
        try:
            return cls.from_dict(value)
        except InvalidGraph as e:
            raise InvalidGraph(f"{path}: {e}") from None

    def to_json(self, path: str | Path) -> None:
        """Writes a file."""
        write_json(path, self.to_dict())


def _some_cycle(left: set[NodeId], edges: Iterable[tuple[NodeId, NodeId]]) -> str:
    before: dict[NodeId, NodeId] = {}
    for u, v in edges:
        if u in left and v in left:
            before[v] = u
    at = next(iter(before))
    seen: list[NodeId] = []
    while at not in seen:
        seen.append(at)
        at = before[at]
    cycle = [*seen[seen.index(at) :], at]
    shown = [str(i) for i in reversed(cycle)]
    if len(shown) > 9:
        shown = [*shown[:8], "...", shown[-1]]
    return " -> ".join(shown)
