"""Measured costs of a model's operators on the devices a plan is made for: what `--measure` and `measure: true` do.

One device of each kind runs every distinct part of the model once (graph/measure.py keeps what it measured on disk),
while its node's other cores do the same, as they will in a step: they share caches and memory.  The other devices of
the kind are as much slower or faster as they are in the model's most frequent part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nesa_ray.cluster.measure import flops_meter
from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import InvalidConfig, RuntimeFailure
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.graph import NodeId
from nesa_ray.graph.measure import Work, measure, pace

WINDOW_S = 0.3

Seconds = dict[NodeId, dict[str, float]]
Tail = Callable[[str], float]  # torch device -> seconds


def cache_directory() -> Path:
    """Where measured times are kept: $NESA_RAY_CACHE, else ~/.cache/nesa_ray."""
    return Path(os.environ.get("NESA_RAY_CACHE") or Path.home() / ".cache" / "nesa_ray") / "measured"


def measure_here(captured: Captured, topology: Topology, mode: str) -> tuple[Seconds, Topology]:
    """(partition's `seconds`, the topology with each device's speed), measured on this machine for a described one.

    Raises InvalidConfig for a kind of device that this machine hasn't got.
    """
    import torch

    for kind in {d.kind for d in topology.devices}:
        if kind != "cpu" and not (kind == "gpu" and torch.cuda.is_available()):
            raise InvalidConfig(
                f"measure: the cluster has devices of kind {kind!r}, this machine has none; without --cluster the live "
                "cluster's own devices are measured"
            )
    work = Work.of(captured)
    found = {kind: _measure(work, device, mode, cache_directory()) for kind, device in _examples(topology).items()}
    return _joined(found, topology, {})


def measure_live(
    captured: Captured,
    topology: Topology,
    mode: str,
    *,
    tail: tuple[NodeId, Tail] | None = None,
    compare: bool = True,
    remember: bool = True,
) -> tuple[Seconds, Topology]:
    """The same on the live cluster's devices, each pinned as a stage will be.  Raises RuntimeFailure if one is lost.

    tail      what comes after a node, the loss: its seconds are added to the node's
    compare   all devices run a part of the model at once, and how fast each is in it counts; without it, what the
              topology says of their flops
    remember  without it nothing is read from disk
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from nesa_ray.cluster.probe import live_nodes
    from nesa_ray.runtime.placement import Seat

    nodes, work = live_nodes(), Work.of(captured)
    cache = cache_directory() if remember else None
    examples = _examples(topology)
    wanted = [
        d for d in topology.devices
        if compare or d in examples.values() or any(d.node == e.node and d.kind == e.kind for e in examples.values())
    ]  # fmt: skip
    at: dict[str, Any] = {}
    found: dict[str, tuple[Mapping[NodeId, float], float]] = {}
    paces: dict[str, float] = {}
    try:
        for d in wanted:
            seat = Seat(stage=0, replica=0, device=d, node_id=nodes[d.node]["NodeID"], bundle=0)
            where = NodeAffinitySchedulingStrategy(seat.node_id, soft=False)
            options = {"num_cpus": 0, "num_gpus": 1 if d.kind == "gpu" else 0, "scheduling_strategy": where}
            at[d.id] = ray.remote(_Measurer).options(**options).remote(seat)
        ray.get([m.ready.remote() for m in at.values()])
        if compare:
            seconds = ray.get([m.pace.remote(work, mode) for m in at.values()])
            paces = dict(zip(at, seconds, strict=True))
        for kind, device in examples.items():
            beside = [d for d in wanted if kind == "cpu" and d.node == device.node and d.id != device.id]
            for d in beside:
                at[d.id].keep_busy.remote(work, mode)
            measured = at[device.id].measure.remote(work, mode, cache, len(beside), tail[1] if tail else None)
            times, flops_per_s, tail_s = ray.get(measured)
            if tail is not None:
                times = {**times, tail[0]: times[tail[0]] + tail_s}
            found[kind] = times, flops_per_s
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as e:
        raise RuntimeFailure(f"measure: a device was lost: {str(e).splitlines()[0]}") from None
    finally:
        for m in at.values():
            ray.kill(m)
    speeds = {d.id: paces[examples[d.kind].id] / paces[d.id] for d in wanted if compare}
    return _joined(found, topology, speeds)


class _Measurer:
    """An actor that measures where a stage will sit."""

    def __init__(self, seat: Any) -> None:
        self._where, self._device = seat.pin(), seat.device
        self._threads = max(1, len(seat.device.cores))

    def ready(self) -> None:
        """Returns once the process runs where it should."""

    def measure(
        self, work: Work, mode: str, cache: Path | None, beside: int, tail: Tail | None
    ) -> tuple[Mapping[NodeId, float], float, float]:
        """(seconds of each node, flops per second, seconds of the tail)."""
        return *_measure(work, self._device, mode, cache, beside), tail(self._where) if tail is not None else 0.0

    def pace(self, work: Work, mode: str) -> float:
        """See graph/measure.py."""
        return pace(work, mode=mode, device=self._where, threads=self._threads)

    def keep_busy(self, work: Work, mode: str) -> None:
        """Does the same for nothing, until the actor is killed."""
        while True:
            pace(work, mode=mode, device=self._where, threads=self._threads)


def _examples(topology: Topology) -> dict[str, Device]:
    """The fastest device of each kind."""
    found: dict[str, Device] = {}
    for d in topology.devices:
        if d.kind not in found or d.flops_per_s > found[d.kind].flops_per_s:
            found[d.kind] = d
    return found


def _measure(
    work: Work, device: Device, mode: str, cache: Path | None, beside: int = 0
) -> tuple[Mapping[NodeId, float], float]:
    """(seconds of each node, flops per second of the same process in matrix products); `beside` so many others."""
    import torch

    where = "cpu" if device.kind == "cpu" else "cuda:0"
    threads = max(1, len(device.cores))
    seconds = measure(work, mode=mode, device=where, threads=threads, cache=cache, beside=beside)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        flops = flops_meter(where, WINDOW_S)
        flops_per_s = max(flops(WINDOW_S) for _ in range(3))
    finally:
        torch.set_num_threads(before)
    return {n: next(iter(times.values())) for n, times in seconds.items()}, flops_per_s


def _joined(
    found: Mapping[str, tuple[Mapping[NodeId, float], float]], topology: Topology, speeds: Mapping[str, float]
) -> tuple[Seconds, Topology]:
    seconds: Seconds = {}
    for kind, (times, _) in found.items():
        for node, s in times.items():
            seconds.setdefault(node, {})[kind] = s
    devices = tuple(
        replace(d, speed=speeds.get(d.id) or (d.flops_per_s / found[d.kind][1] if d.flops_per_s else d.speed))
        for d in topology.devices
    )
    return seconds, replace(topology, devices=devices)
