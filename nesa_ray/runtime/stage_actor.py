"""StageActor: a Ray actor that owns one replica of one stage, pinned to its device.

A thin shell: it takes its seat, opens its channel, and hosts a worker object (a training stage, a serving stage, …)
that does the work.  Nothing here knows what the worker is.  Where devices are measured for the plan, the actors that do
so are these: their processes have started by the time a stage is to run there.  So that they can be started first of
all, nothing here imports torch before a method is called.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray

from nesa_ray.cluster.probe import Probe
from nesa_ray.cluster.topology import Link
from nesa_ray.garbage import kept
from nesa_ray.graph.allocator import keep_freed_memory
from nesa_ray.runtime.placement import Seat

if TYPE_CHECKING:
    import torch

    from nesa_ray.runtime.channel import Address, SocketChannel


@dataclass(frozen=True)
class StageContext:
    """What a worker is given: where it sits, its torch device, its open channel, the link to each peer that has one.

    rendezvous  where the replicas of its stage meet, if it has others: the first of them listens there, as `listener`
    """

    seat: Seat
    device: torch.device
    channel: SocketChannel
    links: Mapping[str, Link] = field(default_factory=dict)
    rendezvous: Address | None = None
    listener: socket.socket | None = None


def peer_name(stage: int, replica: int) -> str:
    """The channel name of one stage replica."""
    return f"stage{stage}/{replica}"


class StageActor(Probe):
    """See the top of the file.  Made by Pipeline or Probes, through as_actor."""

    _context: StageContext
    _worker: Any = None

    def sit(self, seat: Seat, token: str) -> Address:
        """Takes its seat: pins itself and opens its channel.  Where that listens."""
        with kept():
            import torch

            from nesa_ray.runtime.channel import SocketChannel

        self.stop_measuring()
        device = torch.device(seat.pin())
        keep_freed_memory()
        channel = SocketChannel(peer_name(seat.stage, seat.replica), token, ray.util.get_node_ip_address())
        self._context = StageContext(seat, device, channel)
        return channel.address

    def listen(self) -> Address:
        """Listens for the other replicas of its stage.  Where."""
        from nesa_ray.runtime.channel import Address

        listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        self._context = replace(self._context, listener=listener)
        return Address(*listener.getsockname())

    def connect(self, peers: Mapping[str, Address], links: Mapping[str, Link], emulate: bool) -> None:
        """Connects the channel to the peers, over links that are as in the topology, or that are emulated to be."""
        channel = self._context.channel
        self._context = replace(self._context, links=links)
        others = {n: a for n, a in peers.items() if n != channel.name}
        channel.connect(others, links=links, emulate=emulate)

    def build(self, factory: Callable[..., Any], kwargs: Mapping[str, Any], rendezvous: Address | None) -> Any:
        """Makes the worker: factory(context, **kwargs).  Returns what the worker's `ready()` says, if it has one."""
        with kept():
            self._worker = factory(replace(self._context, rendezvous=rendezvous), **kwargs)
        ready = getattr(self._worker, "ready", None)
        return ready() if ready else None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the worker."""
        return getattr(self._worker, method)(*args, **kwargs)

    def where(self) -> dict[str, Any]:
        """Where this process really runs: for tests, and for `status`."""
        import torch

        return {
            "node_id": ray.get_runtime_context().get_node_id(),
            "cores": sorted(os.sched_getaffinity(0)),
            "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
        }

    def close(self) -> None:
        """Ends the worker and the channel."""
        with contextlib.suppress(Exception):
            if hasattr(self._worker, "close"):
                self._worker.close()
        self._context.channel.close()
