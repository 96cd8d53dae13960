"""Plan -> placement group: a bundle per stage replica, on the node that the plan decided, and how its actor is pinned.

The group is asked for bundle by bundle with a label selector on ray.io/node-id, so Ray has no choice of node; within a
node, Ray hands out GPUs, and on CPUs each actor pins itself to its device's cores (`Seat.pin`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nesa_ray.cluster.labels import RAY_NODE_ID
from nesa_ray.cluster.pinning import pin
from nesa_ray.cluster.probe import live_nodes
from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible, InvalidPlan, InvalidTopology, Timeout
from nesa_ray.planning.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where one replica of one stage sits.  A value: it travels to the actor, which calls `pin`."""

    stage: int
    replica: int
    device: Device
    node_id: str
    bundle: int

    @property
    def resources(self) -> dict[str, float]:
        """What the bundle reserves: a GPU, or a Ray CPU for each core."""
        return {"GPU": 1} if self.device.kind == "gpu" else {"CPU": max(1, len(self.device.cores))}

    def pin(self) -> str:
        """Binds the calling process to its device; the torch device to use.  Call it first in the actor.

        On a GPU Ray has made exactly one visible (CUDA_VISIBLE_DEVICES), so it is cuda:0.
        """
        if self.device.kind == "gpu":
            import torch

            torch.cuda.set_device(0)
            return "cuda:0"
        pin(self.device.cores, self.device.niceness)
        return "cpu"


@dataclass(frozen=True)
class Placement:
    """A ready placement group and its seats, by stage and replica.  `close` removes the group and what sits in it."""

    seats: tuple[Seat, ...]
    group: PlacementGroup

    @cached_property
    def seat(self) -> Mapping[tuple[int, int], Seat]:
        """Seats by (stage, replica)."""
        return {(s.stage, s.replica): s for s in self.seats}

    def options(self, stage: int, replica: int = 0) -> dict[str, Any]:
        """For `Actor.options(**...)`: the bundle, and all of its CPUs or its GPU."""
        seat = self.seat[stage, replica]
        return {
            "num_cpus": seat.resources.get("CPU", 0),
            "num_gpus": seat.resources.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group,
                placement_group_bundle_index=seat.bundle,
                placement_group_capture_child_tasks=False,
            ),
        }

    def close(self) -> None:
        """Removes the group: its actors end, its CPUs and GPUs are free again.  Idempotent."""
        if ray.is_initialized():
            remove_placement_group(self.group)

    def __enter__(self) -> Placement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def seats(plan: Plan, topology: Topology, nodes: Mapping[str, Mapping[str, Any]]) -> tuple[Seat, ...]:
    """The plan's seats on live nodes (`live_nodes`), a bundle each.

    Raises InvalidPlan for a device that the topology lacks, InvalidTopology for a node that isn't live, Infeasible
    when a node has fewer CPUs or GPUs than the plan puts there.
    """
    found: list[Seat] = []
    for stage in plan.stages:
        for replica, identity in enumerate(stage.devices):
            device = topology.device.get(identity)
            if device is None:
                raise InvalidPlan(f"stage {stage.id}: devices: the topology has no device {identity!r}")
            node = nodes.get(device.node)
            if node is None:
                there = ", ".join(sorted(nodes)) or "none"
                raise InvalidTopology(f"stage {stage.id}: needs node {device.node!r}, the live nodes are {there}")
            seat = Seat(stage=stage.id, replica=replica, device=device, node_id=node["NodeID"], bundle=len(found))
            found.append(seat)
    for name, needed in _needs(found).items():
        for resource, amount in needed.items():
            there = nodes[name]["Resources"].get(resource, 0)
            if amount > there:
                raise Infeasible(f"node {name}: the plan needs {amount:g} {resource}, the node has {there:g}")
    return tuple(found)


def place(plan: Plan, topology: Topology, *, name: str = "", max_seconds: float = 60.0) -> Placement:
    """Reserves the plan's bundles on the connected cluster and waits until they are ready; `name` is the group's.

    Raises what `seats` raises, and Timeout when others hold what the plan needs for longer than max_seconds.
    """
    if not ray.is_initialized():
        raise InvalidTopology("placing a plan needs a live Ray cluster, this process is connected to none")
    taken = seats(plan, topology, live_nodes())
    group = placement_group(
        [s.resources for s in taken],
        strategy="PACK",
        name=name,
        bundle_label_selector=[{RAY_NODE_ID: s.node_id} for s in taken],
    )
    ready = False
    try:
        end = time.monotonic() + max_seconds
        while not (ready := group.wait(min(2.0, max(0.01, end - time.monotonic())))) and time.monotonic() < end:
            seats(plan, topology, live_nodes())  # raises when a node has died meanwhile
    finally:
        if not ready:
            remove_placement_group(group)
    if not ready:
        needs = "; ".join(f"{n} {_show(r)}" for n, r in _needs(taken).items())
        free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        raise Timeout(
            f"the plan's {len(taken)} seats were not free within {max_seconds:g} s: needed {needs}; "
            f"free in the whole cluster: {_show(free) or 'nothing'}. Does another job hold them?"
        )
    return Placement(taken, group)


def _needs(taken: list[Seat] | tuple[Seat, ...]) -> dict[str, Counter[str]]:
    needs: dict[str, Counter[str]] = {}
    for seat in taken:
        needs.setdefault(seat.device.node, Counter()).update(seat.resources)
    return needs


def _show(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))
