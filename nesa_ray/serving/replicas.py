"""Several replicas of a pipeline on one cluster: each holds a share of its devices, and plans and runs on that alone.

There are as many shares as there may ever be replicas.  A replica takes the first free one, and holds it by an actor
with the share's name, which ends with the replica however that ends; the next replica waits for it.  So a new version
of an endpoint takes over the devices of the old one as soon as that has answered its last request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray
from ray.util import get_placement_group, remove_placement_group

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import Infeasible, Timeout

_NAMESPACE = "nesa_ray"
_RETRY_S = 0.25


@dataclass(frozen=True)
class Share:
    """The share `index` of `count`."""

    index: int
    count: int

    def of(self, devices: Sequence[str]) -> tuple[str, ...]:
        """The devices of this share: those of a node stay together as far as can be, and numbers differ by one at most.

        Raises Infeasible where there are fewer devices than shares.
        """
        if len(devices) < self.count:
            raise Infeasible(f"replicas: {self.count} pipelines need as many devices, the cluster has {len(devices)}")
        ends = [i * len(devices) // self.count for i in range(self.count + 1)]
        return tuple(devices[ends[self.index] : ends[self.index + 1]])

    def within(self, topology: Topology) -> Topology:
        """The topology with this share's devices alone."""
        mine = set(self.of([d.id for d in topology.devices]))
        return replace(topology, devices=tuple(d for d in topology.devices if d.id in mine))


WHOLE = Share(0, 1)


class _Holder:
    """An actor that does nothing: as long as it lives, its name is taken."""


class Claim:
    """A share that is held until `release`, or until this process ends.  `name`: the application's and the share's."""

    def __init__(self, application: str, count: int, max_seconds: float) -> None:
        """Waits for a free share; what a replica that died has left reserved there is freed.  Raises Timeout."""
        end = time.monotonic() + max_seconds
        while True:
            for index in range(count):
                self.share, self.name = Share(index, count), f"{application}/{index}"
                try:
                    self._holder = (
                        ray.remote(_Holder)
                        .options(name=self.name, namespace=_NAMESPACE, num_cpus=0, max_restarts=0)
                        .remote()
                    )
                except ValueError:  # the name is taken
                    continue
                _free_what_is_left(self.name)
                return
            if time.monotonic() > end:
                raise Timeout(f"{application}: all {count} shares of the devices were held for {max_seconds:g} s")
            time.sleep(_RETRY_S)

    def release(self) -> None:
        """Frees the share.  Idempotent."""
        if ray.is_initialized():
            ray.kill(self._holder)


def _free_what_is_left(name: str) -> None:
    """Ray keeps a placement group whose creator was killed, as long as the job lives: here, as Serve does."""
    try:
        remove_placement_group(get_placement_group(name))
    except ValueError:  # none has that name
        return
