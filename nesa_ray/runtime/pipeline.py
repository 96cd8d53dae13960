"""Pipeline: a plan's stages, live on a Ray cluster.  Ray starts, watches and stops them; tensors pass beside it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import ray
import torch

from nesa_ray.cluster.joining import connect
from nesa_ray.cluster.probe import Probes, as_actor, probe
from nesa_ray.cluster.topology import Link, Topology
from nesa_ray.errors import NesaError, StageFailed, Timeout
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.split import StageModule, StageProgram, split
from nesa_ray.planning.plan import Plan
from nesa_ray.planning.schedule import Action, ActionKind
from nesa_ray.runtime.channel import Address, Kind, SocketChannel, Tag
from nesa_ray.runtime.executor import Executor
from nesa_ray.runtime.placement import Placement, place
from nesa_ray.runtime.stage_actor import StageActor, StageContext, peer_name

Seat = tuple[int, int]  # (stage, replica)


class Pipeline:
    """One pinned actor per stage replica, each connected to every other of its replica, hosting a worker.

    `factory` makes the worker in the actor: factory(context, **kwargs(stage, replica)).  With `emulate_links` messages
    between actors take as long as the topology's links would.  Actors that `probes` has on the plan's devices are taken
    over, all others there end.  Raises what placement raises, and StageFailed when an actor or its worker doesn't come
    up.  Use it as a context manager, or call close().
    """

    def __init__(
        self,
        plan: Plan,
        topology: Topology,
        factory: Callable[..., Any],
        kwargs: Callable[[int, int], Mapping[str, Any]],
        *,
        token: str | None = None,
        outside: Mapping[str, Address] | None = None,
        name: str = "",
        emulate_links: bool = False,
        probes: Probes | None = None,
        max_seconds: float = 300.0,
    ) -> None:
        self.plan = plan
        self.token = token or SocketChannel.new_token()
        self.actors: dict[Seat, Any] = {}
        used = [topology.device[d] for s in plan.stages for d in s.devices if d in topology.device]
        there = probes.keep(used) if probes is not None else {}
        try:
            self.placement: Placement = place(plan, topology, name=name)
        except BaseException:
            _end(there.values())
            raise
        try:
            remote = as_actor(StageActor)
            for sat, seat in self.placement.seat.items():
                waits = there.pop(seat.device.id, None)
                self.actors[sat] = waits or remote.options(**self.placement.options(*sat)).remote()
            sitting = {s: a.sit.remote(self.placement.seat[s], self.token) for s, a in self.actors.items()}
            addresses = self._gather(sitting, max_seconds)
            self.addresses = {peer_name(*s): address for s, address in addresses.items()}
            peers = {
                s: {n: a for n, a in self.addresses.items() if n.endswith(f"/{s[1]}")} | dict(outside or {})
                for s in self.actors
            }
            links = {s: self._links(topology, s, peers[s]) for s in self.actors}
            self._gather(
                {s: a.connect.remote(peers[s], links[s], emulate_links) for s, a in self.actors.items()}, max_seconds
            )
            listening = {s: self.actors[s].listen.remote() for s in ((i, 0) for i, r in self.actors if r == 1)}
            rendezvous = self._gather(listening, max_seconds)
            self.built = self._gather(
                {s: a.build.remote(factory, kwargs(*s), rendezvous.get((s[0], 0))) for s, a in self.actors.items()},
                max_seconds,
            )
        except BaseException:
            self.close()
            raise

    def call(
        self,
        method: str,
        *args: Any,
        only: Callable[[Seat], bool] | None = None,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> dict[Seat, Any]:
        """Calls a method of every worker (or of those that `only` picks) at once; their answers by (stage, replica).

        The first failure is raised at once, as the error the worker raised, or StageFailed when its actor died.
        """
        chosen = {s: a for s, a in self.actors.items() if only is None or only(s)}
        return self._gather({s: a.call.remote(method, *args, **kwargs) for s, a in chosen.items()}, timeout_s)

    def where(self) -> dict[Seat, dict[str, Any]]:
        """Where each actor really runs."""
        return self._gather({s: a.where.remote() for s, a in self.actors.items()}, 60.0)

    def close(self) -> None:
        """Ends the workers, the actors and the placement group.  Idempotent."""
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray.wait([a.close.remote() for a in self.actors.values()], num_returns=len(self.actors), timeout=5)
            _end(self.actors.values())
        self.actors = {}
        self.placement.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _links(self, topology: Topology, seat: Seat, peers: Mapping[str, Address]) -> dict[str, Link]:
        """From an actor to each other actor among its peers."""
        node = {peer_name(*s): taken.device.node for s, taken in self.placement.seat.items()}
        mine = peer_name(*seat)
        return {n: topology.link(node[mine], node[n]) for n in peers if n in node and n != mine}

    def _gather(self, pending: Mapping[Seat, Any], timeout_s: float | None) -> dict[Seat, Any]:
        seat_of = {ref: s for s, ref in pending.items()}
        answers: dict[Seat, Any] = {}
        waiting = list(seat_of)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=timeout_s)
            if not done:
                late = ", ".join(peer_name(*seat_of[r]) for r in waiting)
                raise Timeout(f"pipeline: {late} didn't answer within {timeout_s} s")
            seat = seat_of[done[0]]
            try:
                answers[seat] = ray.get(done[0])
            except ray.exceptions.RayTaskError as e:
                if isinstance(e.cause, NesaError):
                    raise type(e.cause)(f"{peer_name(*seat)}: {e.cause}") from None
                raise StageFailed(f"{peer_name(*seat)}: {type(e.cause).__name__}: {e.cause}") from e
            except ray.exceptions.RayActorError as e:
                raise StageFailed(f"{peer_name(*seat)}: its actor died: {str(e).splitlines()[0]}") from None
        return {s: answers[s] for s in pending}


def _end(actors: Iterable[Any]) -> None:
    for actor in actors:
        with contextlib.suppress(Exception):
            ray.kill(actor)


class InferenceStage:
    """A worker that forwards micro-batches."""

    def __init__(
        self,
        context: StageContext,
        *,
        program: StageProgram,
        state: Mapping[str, torch.Tensor],
        peers: Mapping[int, str],
        final: int,
    ) -> None:
        self._module = StageModule(program, state, device=context.device)
        self._weights = dict(self._module.state_dict())
        self._executor = Executor({program.id: self._module}, context.channel, peers, final)
        self._channel, self._driver = context.channel, "driver"

    def run(self, index: int) -> None:
        """Forwards one micro-batch; the final stage sends the results to the driver."""
        program = self._module.program
        action = Action(program.id, ActionKind.FORWARD, index)
        step = self._executor.execute(action, 1, {program.id: self._weights}, training=False)
        for name, value in step.results.get(index, {}).items():
            self._channel.send(self._driver, Tag(Kind.CONTROL, name, index), value)


class InferencePipeline:
    """What `launch` returns: callable like the module."""

    def __init__(self, captured: Captured, plan: Plan, topology: Topology, state: Mapping[str, torch.Tensor]) -> None:
        programs = split(captured, plan.stage_of)
        self._captured, self._programs = captured, programs
        self._final = next(p.id for p in programs if p.results)
        self._peers = {p.id: peer_name(p.id, 0) for p in programs}
        token = SocketChannel.new_token()
        self._channel = SocketChannel("driver", token, ray.util.get_node_ip_address())
        self._index = itertools.count()
        first = {p.id: p for p in programs}

        def kwargs(stage: int, replica: int) -> dict[str, Any]:
            program = first[stage]
            mine = {n: state[n] for n in (*program.state, *program.borrows)}
            return {"program": program, "state": mine, "peers": self._peers, "final": self._final}

        try:
            self.stages = Pipeline(
                plan, topology, InferenceStage, kwargs, token=token, outside={"driver": self._channel.address}
            )
            self._channel.connect(self.stages.addresses)
        except BaseException:
            self._channel.close()
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for one micro-batch."""
        values = self._captured.flatten(args, kwargs)
        index = next(self._index)
        for program in self._programs:
            for name in program.inputs:
                tag = Tag(Kind.INPUT, f"{name}>{program.id}", index)
                self._channel.send(self._peers[program.id], tag, values[name])
        self.stages.call("run", index, only=lambda seat: seat[1] == 0)
        results: dict[str, torch.Tensor] = {}
        for name in next(p.results for p in self._programs if p.results):
            value = self._channel.recv(Tag(Kind.CONTROL, name, index), 60.0)
            assert value is not None
            results[name] = value
        return self._captured.unflatten(results)

    def close(self) -> None:
        """Ends the stages.  Idempotent."""
        self.stages.close()
        self._channel.close()

    def __enter__(self) -> InferencePipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def launch(
    captured: Captured, plan: Plan, topology: Topology | None = None, state: Mapping[str, torch.Tensor] | None = None
) -> InferencePipeline:
    """The plan's stages on Ray, for inference: `with launch(captured, plan) as pipeline: pipeline(x)`.

    On the live cluster, or on one of this machine, started where there is none and none is named.  `topology` is what
    the plan was made for (probed from the cluster without it); `state` replaces the captured weights.  Raises
    CheckpointError when a weight has no value, and what placement raises.
    """
    connect(start=True)
    if topology is None:
        topology = probe(devices=plan.devices)
    return InferencePipeline(captured, plan, topology, captured.weights(state))
