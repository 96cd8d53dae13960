"""Measured costs of a model's operators on the devices a plan is made for: what `--measure` and `measure: true` do.

One device of each kind runs every distinct part of the model once (graph/measure.py keeps what it measured on disk);
the other devices of the kind are as much slower or faster as the probe found them in matrix products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nesa_ray.cluster.measure import measure_flops
from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import InvalidConfig, RuntimeFailure
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.graph import NodeId
from nesa_ray.graph.measure import Work, measure

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
    found = {kind: _measure(work, device, mode) for kind, device in _examples(topology).items()}
    return _joined(found, topology)


def measure_live(
    captured: Captured, topology: Topology, mode: str, *, tail: tuple[NodeId, Tail] | None = None
) -> tuple[Seconds, Topology]:
    """The same on the live cluster's devices, each pinned as a stage will be.  Raises RuntimeFailure if one is lost.

    `tail` is what comes after a node, the loss: its seconds are added to the node's.
    """
    import ray

    from nesa_ray.cluster.probe import live_nodes
    from nesa_ray.runtime.placement import Seat

    nodes, work = live_nodes(), Work.of(captured)
    found = {}
    for kind, device in _examples(topology).items():
        seat = Seat(stage=0, replica=0, device=device, node_id=nodes[device.node]["NodeID"], bundle=0)
        task = ray.remote(max_calls=1, max_retries=0)(_measure_in_seat).options(
            num_cpus=0, num_gpus=1 if kind == "gpu" else 0,
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(seat.node_id, soft=False),
        )  # fmt: skip
        try:
            times, flops_per_s, tail_s = ray.get(task.remote(seat, work, mode, tail[1] if tail else None))
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as e:
            raise RuntimeFailure(f"measure: {device.id} was lost: {str(e).splitlines()[0]}") from None
        if tail is not None:
            times = {**times, tail[0]: times[tail[0]] + tail_s}
        found[kind] = times, flops_per_s
    return _joined(found, topology)


def _measure_in_seat(
    seat: Any, work: Work, mode: str, tail: Tail | None
) -> tuple[Mapping[NodeId, float], float, float]:
    where = seat.pin()
    return *_measure(work, seat.device, mode), tail(where) if tail is not None else 0.0


def _examples(topology: Topology) -> dict[str, Device]:
    """The fastest device of each kind."""
    found: dict[str, Device] = {}
    for d in topology.devices:
        if d.kind not in found or d.flops_per_s > found[d.kind].flops_per_s:
            found[d.kind] = d
    return found


def _measure(work: Work, device: Device, mode: str) -> tuple[Mapping[NodeId, float], float]:
    """(seconds of each node, flops per second of the same process in matrix products)."""
    import torch

    where = "cpu" if device.kind == "cpu" else "cuda:0"
    threads = max(1, len(device.cores))
    seconds = measure(work, mode=mode, device=where, threads=threads, cache=cache_directory())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        flops_per_s = max(measure_flops(where, WINDOW_S) for _ in range(3))
    finally:
        torch.set_num_threads(before)
    return {n: next(iter(times.values())) for n, times in seconds.items()}, flops_per_s


def _joined(found: Mapping[str, tuple[Mapping[NodeId, float], float]], topology: Topology) -> tuple[Seconds, Topology]:
    seconds: Seconds = {}
    for kind, (times, _) in found.items():
        for node, s in times.items():
            seconds.setdefault(node, {})[kind] = s
    devices = tuple(
        replace(d, speed=d.flops_per_s / found[d.kind][1]) if d.flops_per_s else d for d in topology.devices
    )
    return seconds, replace(topology, devices=devices)
