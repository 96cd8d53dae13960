"""The engine's hold on its running stages: a channel to them, their names, and their end."""

from __future__ import annotations

from typing import Protocol

from nesa_ray.runtime.channel import SocketChannel
from nesa_ray.serving.blueprint import Blueprint
from nesa_ray.serving.stage import ENGINE, StageWorker


class Stages(Protocol):
    """Running stages.  `channel` is the engine's end, connected to all of them."""

    channel: SocketChannel

    def stats(self) -> list[dict[str, float]]:
        """Each stage's StageWorker.stats()."""

    def close(self) -> None:
        """Frees them; the engine has told them to stop."""


class LocalStages:
    """All stages in this process, on threads, over real sockets: for tests, notebooks and one-machine use."""

    def __init__(self, blueprint: Blueprint) -> None:
        token = SocketChannel.new_token()
        names = [ENGINE, *blueprint.specs[0].peers.values()]
        channels = {n: SocketChannel(n, token) for n in names}
        self._channels = channels
        for channel in channels.values():
            channel.connect({n: c.address for n, c in channels.items() if n != channel.name})
        self.channel = channels[ENGINE]
        self.workers = [StageWorker(channels[s.peers[s.program.id]], s) for s in blueprint.specs]
        for worker in self.workers:
            worker.start()

    def stats(self) -> list[dict[str, float]]:
        """See Stages."""
        return [w.stats() for w in self.workers]

    def close(self) -> None:
        """See Stages."""
        for worker in self.workers:
            worker.join()
        for channel in self._channels.values():
            channel.close()
