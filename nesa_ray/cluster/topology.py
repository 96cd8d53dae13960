"""The machines a plan can use: unequal devices, and the links between their nodes.  No Ray here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nesa_ray.errors import InvalidTopology
from nesa_ray.fields import Fields, read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one group of CPU cores.

    node                the host it sits on: links are between nodes
    flops_per_s         sustained speed; 0 = unknown, then only nodes with measured times run here
    memory_bytes_per_s  memory bandwidth; 0 = unknown
    free_transfer       pays neither receive nor send
    cores               CPU cores the stage is pinned to (empty on a GPU: Ray picks the device)
    niceness            CPU scheduling weight (0-19): a slower share of the same cores, to emulate unequal speed
    speed               relative to the device that a graph's compute_s of this kind are the times of
    """

    id: str
    kind: str = "gpu"
    node: str = ""
    memory_bytes: float = math.inf
    flops_per_s: float = 0.0
    memory_bytes_per_s: float = 0.0
    free_transfer: bool = False
    cores: tuple[int, ...] = ()
    niceness: int = 0
    speed: float = 1.0

    @classmethod
    def from_dict(cls, value: Any, position: int) -> Device:
        """Reads one entry of cluster.json's `devices`; raises InvalidTopology."""
        known = Fields(value, f"devices[{position}]", InvalidTopology)
        identity = str(known.identifier())
        known.where = f"device {identity}"
        known.only(cls.__slots__)
        cores = known.items("cores", required=False)
        if any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in cores):
            raise known.fail("cores", f"needs core numbers ≥ 0, got {cores}")
        return cls(
            id=identity,
            kind=known.text("kind", "gpu"),
            node=known.text("node", ""),
            memory_bytes=known.number("memory_bytes"),
            flops_per_s=known.number("flops_per_s", 0.0),
            memory_bytes_per_s=known.number("memory_bytes_per_s", 0.0),
            free_transfer=known.flag("free_transfer"),
            cores=tuple(cores),
            niceness=int(known.number("niceness", 0)),
            speed=known.number("speed", 1.0, positive=True),
        )

    def to_dict(self) -> dict[str, Any]:
        """The entry of cluster.json."""
        out: dict[str, Any] = {"id": self.id, "kind": self.kind, "node": self.node, "memory_bytes": self.memory_bytes}
        for name in ("flops_per_s", "memory_bytes_per_s", "free_transfer", "niceness"):
            if getattr(self, name):
                out[name] = getattr(self, name)
        if self.speed != 1.0:
            out["speed"] = self.speed
        if self.cores:
            out["cores"] = list(self.cores)
        return out


@dataclass(frozen=True, slots=True)
class Link:
    """A connection between two nodes, the same in both directions.  bytes_per_s may be infinite."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def seconds(self, n_bytes: float) -> float:
        """Time of one transfer."""
        return self.latency_s + n_bytes / self.bytes_per_s

    @classmethod
    def from_fields(cls, known: Fields) -> Link:
        """Reads bytes_per_s and latency_s."""
        return cls(known.number("bytes_per_s", math.inf, positive=True), known.number("latency_s", 0.0))

    def to_dict(self) -> dict[str, float]:
        """The contract's link object; an infinite speed is left out."""
        out = {"latency_s": self.latency_s}
        if math.isfinite(self.bytes_per_s):
            out["bytes_per_s"] = self.bytes_per_s
        return out


@dataclass(frozen=True)
class Topology:
    """Devices and links.  Immutable; checked when made.

    Two devices of one node use `default`, like every pair of nodes that `pairs` doesn't name.
    """

    devices: tuple[Device, ...]
    default: Link = Link()
    pairs: Mapping[frozenset[str], Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.devices:
            raise InvalidTopology("devices: the cluster is empty, needs at least one device")
        seen = set()
        for d in self.devices:
            if d.id in seen:
                raise InvalidTopology(f"device {d.id}: id is used twice")
            seen.add(d.id)

    @cached_property
    def device(self) -> Mapping[str, Device]:
        """Devices by id."""
        return {d.id: d for d in self.devices}

    def link(self, a: str, b: str) -> Link:
        """The link between two nodes."""
        return self.pairs.get(frozenset((a, b)), self.default)

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))

    @classmethod
    def from_dict(cls, value: Any) -> Topology:
        """Reads the contract's cluster.json; raises InvalidTopology."""
        known = Fields(value, "cluster", InvalidTopology)
        known.only(("version", "devices", "links"))
        if known.number("version", 1) != 1:
            raise known.fail("version", f"needs 1, got {known.value['version']}")
        devices = tuple(Device.from_dict(d, i) for i, d in enumerate(known.items("devices")))
        links = Fields(known.value.get("links", {}), "links", InvalidTopology)
        links.only(("default", "pairs"))
        nodes = {d.node for d in devices}
        default = Fields(links.value.get("default", {}), "links.default", InvalidTopology)
        default.only(("bytes_per_s", "latency_s"))
        pairs: dict[frozenset[str], Link] = {}
        for i, p in enumerate(links.items("pairs", required=False)):
            pair = Fields(p, f"links.pairs[{i}]", InvalidTopology)
            pair.only(("a", "b", "bytes_per_s", "latency_s"))
            ends = frozenset((pair.text("a"), pair.text("b")))
            for end in sorted(ends - nodes):
                raise pair.fail("a, b", f"no device sits on node {end!r}; nodes are {', '.join(sorted(nodes))}")
            if ends in pairs:
                raise pair.fail("a, b", f"the pair {' - '.join(sorted(ends))} is given twice")
            pairs[ends] = Link.from_fields(pair)
        return cls(devices, Link.from_fields(default), pairs)

    def to_dict(self) -> dict[str, Any]:
        """The contract's cluster.json."""
        pairs = [
            {"a": min(ends), "b": max(ends), **link.to_dict()}
            for ends, link in sorted(self.pairs.items(), key=lambda p: sorted(p[0]))
        ]
        return {
            "version": 1,
            "devices": [d.to_dict() for d in self.devices],
            "links": {"default": self.default.to_dict(), "pairs": pairs},
        }

    @classmethod
    def from_json(cls, path: str | Path) -> Topology:
        """Reads a file; raises InvalidTopology naming the file and the field."""
        value = read_json(path, InvalidTopology)
        try:
            return cls.from_dict(value)
        except InvalidTopology as e:
            raise InvalidTopology(f"{path}: {e}") from None

    def to_json(self, path: str | Path) -> None:
        """Writes a file."""
        write_json(path, self.to_dict())
