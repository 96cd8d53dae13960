"""The engine's hold on its running stages: a channel to them, their names on it, and their end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import ray

from nesa_ray.cluster.probe import Probes
from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import InvalidPlan, NesaError, PeerLost
from nesa_ray.graph.capture import Captured
from nesa_ray.planning.plan import Plan
from nesa_ray.runtime.channel import SocketChannel
from nesa_ray.runtime.pipeline import Pipeline
from nesa_ray.runtime.stage_actor import peer_name
from nesa_ray.serving.blueprint import Blueprint, Costs, capture_served, draw, plan_for, served_costs, survey
from nesa_ray.serving.config import EndpointConfig, ServeConfig
from nesa_ray.serving.replicas import WHOLE, Share
from nesa_ray.serving.worker import ENGINE, Drawn, serving_stage

log = logging.getLogger(__name__)
C = TypeVar("C", bound=EndpointConfig)


class Stages(Protocol):
    """Running stages.  `channel` is the engine's end, connected to all of them; `peers` their names by stage id."""

    channel: SocketChannel
    peers: Mapping[int, str]

    def stats(self) -> list[dict[str, float]]:
        """Each stage's Worker.stats()."""

    def close(self) -> None:
        """Frees them; the engine has told them to stop."""


class LocalStages:
    """All stages in this process, on threads, over real sockets: for tests, notebooks and one-machine use."""

    def __init__(self, blueprint: Drawn) -> None:
        token = SocketChannel.new_token()
        self.peers: Mapping[int, str] = {s.program.id: f"stage{s.program.id}" for s in blueprint.specs}
        channels = {n: SocketChannel(n, token) for n in (ENGINE, *self.peers.values())}
        self._channels = channels
        for channel in channels.values():
            channel.connect({n: c.address for n, c in channels.items() if n != channel.name})
        self.channel = channels[ENGINE]
        self.workers = [s.worker(channels[self.peers[s.program.id]], self.peers) for s in blueprint.specs]
        for worker in self.workers:
            worker.start()

    def stats(self) -> list[dict[str, float]]:
        """See Stages."""
        return [w.stats() for w in self.workers]

    def close(self) -> None:
        """See Stages."""
        for worker in self.workers:
            worker.join(1.0)
        for channel in self._channels.values():
            channel.close()  # one that waits for a stage that failed hears of it now
        for worker in self.workers:
            worker.join(10.0)


class RayStages:
    """Stages as actors, each pinned to the plan's device on a live Ray cluster."""

    def __init__(self, blueprint: Drawn, topology: Topology, *, name: str = "", probes: Probes | None = None) -> None:
        """`name` is the placement group's; `probes` has actors that stages may run in.

        Raises what Pipeline raises: Infeasible, InvalidPlan, CheckpointError, StageFailed, Timeout.
        """
        replicated = [s.id for s in blueprint.plan.stages if len(s.devices) > 1]
        if replicated:
            raise InvalidPlan(f"stage {replicated[0]}: has several replicas; a served pipeline has one of each stage")
        self.peers: Mapping[int, str] = {s.program.id: peer_name(s.program.id, 0) for s in blueprint.specs}
        specs = {s.program.id: s for s in blueprint.specs}
        token = SocketChannel.new_token()
        self.channel = SocketChannel(ENGINE, token, ray.util.get_node_ip_address())
        try:
            self._pipeline = Pipeline(
                blueprint.plan,
                topology,
                serving_stage,
                lambda stage, _: {"spec": specs[stage], "peers": self.peers},
                token=token,
                outside={ENGINE: self.channel.address},
                name=name,
                probes=probes,
            )
            self.channel.connect(self._pipeline.addresses)
        except BaseException:
            self.channel.close()
            raise
        self._watching = threading.Thread(target=self._watch, name="engine-actors", daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        """Ray knows of a dead actor even where the network says nothing; the engine hears of it over its channel."""
        try:
            self._pipeline.call("join")
        except NesaError as e:
            self.channel.mailbox.fail(e)
        except Exception as e:
            self.channel.mailbox.fail(PeerLost(f"stages: {type(e).__name__}: {e}"))

    def stats(self) -> list[dict[str, float]]:
        """See Stages."""
        return list(self._pipeline.call("stats", timeout_s=10.0).values())

    def where(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Where each stage's actor really runs."""
        return self._pipeline.where()

    def close(self) -> None:
        """See Stages."""
        self._pipeline.close()
        if threading.current_thread() is not self._watching:
            self._watching.join(10.0)  # a thread that still waits for an actor when Ray is shut down crashes
        self.channel.close()


def phases(config: EndpointConfig) -> Callable[[str], None]:
    """A function that logs what was done since it was last called, and how long it took."""
    began = time.perf_counter()

    def phase(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        log.info("%s: %s in %.1f s", config.served_name, what, now - began)
        began = now

    return phase


def planned(
    config: C,
    share: Share,
    probes: Probes,
    phase: Callable[[str], None],
    capture: Callable[[C], Captured],
    costs: Callable[[C, Captured, Topology], Costs | None] = lambda config, captured, topology: None,
) -> tuple[Captured, Topology, Plan]:
    """The captured model, the share's devices, and the plan for both.

    probes  on the devices: they start while the model is captured
    costs   what the plan is made with besides
    """
    captured = capture(config)
    phase(f"captured {len(captured.node_id)} nodes")
    topology = survey(config, probes, share)
    made_with = costs(config, captured, topology)
    phase(f"surveyed {len(topology.devices)} devices")
    plan = plan_for(config, captured, topology, share, made_with)
    phase(f"planned {len(plan.stages)} stages")
    return captured, topology, plan


def launch(config: ServeConfig, probes: Probes, *, share: Share = WHOLE, name: str = "") -> tuple[Blueprint, Stages]:
    """Captures the model, plans it and starts its stages on a share of the live Ray cluster, in a placement group of
    that name and as far as can be in the processes of `probes`; logs what each phase took.
    """
    phase = phases(config)

    def costs(config: ServeConfig, captured: Captured, topology: Topology) -> Costs:
        return served_costs(config, captured, topology, probes.ask if config.cluster is None else None)

    captured, topology, plan = planned(config, share, probes, phase, capture_served, costs)
    blueprint = draw(config, captured, plan, topology)
    stages = RayStages(blueprint, topology, name=name, probes=probes)
    phase(f"started the stages, {blueprint.blocks} blocks of {blueprint.block_size} tokens")
    return blueprint, stages
