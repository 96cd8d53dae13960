"""Several replicas of a pipeline on one cluster: each holds a share of its devices, and plans and runs on that alone.

There are as many shares as there may ever be replicas.  A replica takes the first free one and holds it until it ends,
however that ends; the next replica waits for it.  So a new version of an endpoint takes over the devices of the old one
as soon as that has answered its last request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ray
from ray.experimental import internal_kv
from ray.util import get_placement_group, remove_placement_group

from nesa_ray.cluster.probe import Probes
from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import Infeasible, Timeout
from nesa_ray.planning.plan import Plan
from nesa_ray.runtime.stage_actor import StageActor
from nesa_ray.serving.config import REPLICA, EndpointConfig

_NAMESPACE = "nesa_ray"
_RETRY_S = 0.25


@dataclass(frozen=True)
class Share:
    """The share `index` of `count`."""

    index: int
    count: int

    def of(self, devices: Sequence[str], stages: int = 1) -> tuple[str, ...]:
        """The devices of this share: those of a node stay together as far as can be, and numbers differ by one at most.

        Raises Infeasible where there are fewer devices than so many stages in each share.
        """
        if len(devices) < self.count * stages:
            who, needed = f"replicas: {self.count} pipelines", "as many"
            if stages > 1:
                who = f"{who} of {stages} stages" if self.count > 1 else f"stages: {stages} stages"
                needed = f"{self.count * stages}"
            raise Infeasible(f"{who} need {needed} devices, the cluster has {len(devices)}")
        ends = [i * len(devices) // self.count for i in range(self.count + 1)]
        return tuple(devices[ends[self.index] : ends[self.index + 1]])

    def within(self, topology: Topology) -> Topology:
        """The topology with this share's devices alone."""
        mine = set(self.of([d.id for d in topology.devices]))
        return replace(topology, devices=tuple(d for d in topology.devices if d.id in mine))


WHOLE = Share(0, 1)


def stage_probes(config: EndpointConfig, share: Share = WHOLE) -> Probes:
    """Starts an actor on each device on which a stage may be to run: it measures, if that is to be, and may stay.

    Raises what Probes raises, and InvalidPlan or Infeasible for a configuration that can't be.
    """
    if config.plan is None:
        stages = config.stages or 1
        return Probes(devices=share.count * stages, only=lambda d: share.of(d, stages), kind=StageActor)
    return Probes(devices=configured_plan(config.plan, share).devices, kind=StageActor)


def configured_plan(file: str, share: Share) -> Plan:
    """The share's plan, of which the configuration has the path."""
    return Plan.from_json(file.replace(REPLICA, str(share.index)))


class Claim:
    """A share that is held until `release`, or until this actor ends.  `name`: the application's and the share's.

    Who holds a share is written where Ray's own tables are: under the share's name and a number, one more for each
    holder, so that of several who find the last holder gone one alone can be the next.
    """

    def __init__(self, application: str, count: int, max_seconds: float) -> None:
        """Waits for a free share; what a replica that died has left reserved there is freed.  Raises Timeout."""
        context = ray.get_runtime_context()
        self._me = json.dumps([context.get_actor_name(), context.namespace])
        end = time.monotonic() + max_seconds
        while True:
            for index in range(count):
                self.share, self.name = Share(index, count), f"{application}/{index}"
                if self._take():
                    _free_what_is_left(self.name)
                    return
            if time.monotonic() > end:
                raise Timeout(f"{application}: all {count} shares of the devices were held for {max_seconds:g} s")
            time.sleep(_RETRY_S)

    def _take(self) -> bool:
        held = _held(self.name)
        if held and _lives(held[-1]):
            return False
        number = int(held[-1].rpartition(b"#")[2]) + 1 if held else 0
        self._key = f"{self.name}#{number:09d}".encode()
        if internal_kv._internal_kv_put(self._key, self._me, overwrite=False, namespace=_NAMESPACE):
            return False
        if _held(self.name)[-1] != self._key:  # others came and went since the first look
            internal_kv._internal_kv_del(self._key, namespace=_NAMESPACE)
            return False
        for old in held:
            internal_kv._internal_kv_del(old, namespace=_NAMESPACE)
        return True

    def release(self) -> None:
        """Frees the share.  Idempotent."""
        if ray.is_initialized():
            internal_kv._internal_kv_put(self._key, "", overwrite=True, namespace=_NAMESPACE)


def _held(name: str) -> list[bytes]:
    """The keys of a share's holders, the last one last."""
    keys: list[bytes] = internal_kv._internal_kv_list(f"{name}#", namespace=_NAMESPACE)
    return sorted(keys)


def _lives(key: bytes) -> bool:
    """Whether the holder has neither released the share nor ended."""
    holder = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    if not holder:
        return False
    try:
        ray.get_actor(*json.loads(holder))
    except ValueError:
        return False
    return True


def _free_what_is_left(name: str) -> None:
    """Ray keeps a placement group whose creator was killed, as long as the job lives: here, as Serve does."""
    try:
        remove_placement_group(get_placement_group(name))
    except ValueError:  # none has that name
        return
