"""A rehearsal: the plan for a cluster that isn't here, run on this machine, its links as slow as they would be.

The same plan, the same code: a local Ray cluster has a node for each node of the cluster.json and a device for each of
its devices, and messages take as long as its links would.  Compute isn't slowed down: what is seen is what the links
leave of this machine's speed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nesa_ray.cluster.local import LocalCluster, LocalNode
from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import InvalidTopology
from nesa_ray.training.config import TrainConfig
from nesa_ray.training.trainer import Trainer

MOST_DEVICES = 64


def stand_ins(topology: Topology) -> list[LocalNode]:
    """A local node for each node, with as many devices; this process's cores are dealt out, shared if they are few.

    Raises InvalidTopology for more devices than one machine can stand in for.
    """
    if len(topology.devices) > MOST_DEVICES:
        raise InvalidTopology(f"rehearse: devices: up to {MOST_DEVICES} fit one machine, got {len(topology.devices)}")
    names = dict.fromkeys(d.node for d in topology.devices)
    deck = itertools.cycle(sorted(os.sched_getaffinity(0)))
    nodes = []
    for name in names:
        devices = [d for d in topology.devices if d.node == name]
        cores = tuple((next(deck),) for _ in devices)
        memory = min(1e12, *(d.memory_bytes for d in devices))
        nodes.append(LocalNode(name=name, devices=len(devices), cores=cores, memory_bytes=memory))
    return nodes


def standing_in(topology: Topology, nodes: Sequence[LocalNode]) -> Topology:
    """The topology as it is, speeds and links, with the devices' places on the nodes: what a rehearsal is planned for.

    A device is called as a probe of the nodes would call it.
    """
    cores = {node.name: enumerate(node.resolved_cores()) for node in nodes}
    devices: list[Device] = []
    for d in topology.devices:
        i, mine = next(cores[d.node])
        devices.append(replace(d, id=f"{d.node}/cpu{i}", kind="cpu", cores=mine, niceness=0))
    return replace(topology, devices=tuple(devices))


@contextlib.contextmanager
def rehearsing(config: TrainConfig, topology: Topology, steps: int) -> Iterator[Trainer]:
    """A Trainer of so many steps on a local cluster of its own, over the topology's links; what it writes goes away.

    Raises what Trainer raises, and InvalidTopology.
    """
    nodes = stand_ins(topology)
    with tempfile.TemporaryDirectory(prefix="nesa-rehearsal-") as directory, LocalCluster(nodes) as local:
        local.connect()
        file = Path(directory) / "cluster.json"
        standing_in(topology, nodes).to_json(file)
        rehearsed = replace(
            config, cluster=str(file), emulate_links=True, measure=False, steps=steps, held_out=(), resume=False,
            checkpoint_every=None, output=str(Path(directory) / "out"),
        )  # fmt: skip
        with Trainer(rehearsed) as trainer:
            yield trainer
