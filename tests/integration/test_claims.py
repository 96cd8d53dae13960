"""Shares of the devices: one holder each, whoever asks at the same time, and however a holder ends."""

import time

import pytest
import ray

from nesa_ray.cluster.local import LocalCluster
from nesa_ray.errors import Timeout
from nesa_ray.serving.replicas import Claim


class Claimant:
    """Holds a share of an application."""

    def claim(self, application: str, count: int, max_seconds: float) -> int:
        self._claim = Claim(application, count, max_seconds)
        return self._claim.share.index

    def release(self) -> None:
        self._claim.release()


def claimants(count: int) -> list:
    remote = ray.remote(num_cpus=0)(Claimant)
    return [remote.options(name=f"claimant{i}-{time.monotonic_ns()}").remote() for i in range(count)]


def test_shares_have_one_holder_each(cluster: LocalCluster) -> None:
    several = claimants(5)
    asked = {a.claim.remote("app/one", 2, 60.0): a for a in several}
    held, waiting = ray.wait(list(asked), num_returns=2, timeout=60)
    assert sorted(ray.get(held)) == [0, 1]
    assert not ray.wait(waiting, timeout=2)[0]  # both are taken
    with pytest.raises(Timeout, match="all 2 shares"):
        ray.get(claimants(1)[0].claim.remote("app/one", 2, 0.5))
    freed = ray.get(held[0])
    ray.kill(asked[held[0]])  # a holder that dies frees its share, one that releases it as well
    [third], waiting = ray.wait(waiting, timeout=60)
    assert ray.get(third) == freed
    ray.get(asked[held[1]].release.remote())
    [fourth], waiting = ray.wait(waiting, timeout=60)
    assert ray.get(fourth) == 1 - freed
    assert not ray.wait(waiting, timeout=2)[0]
    assert ray.get(claimants(1)[0].claim.remote("app/other", 1, 5.0)) == 0  # another application's are its own
    for actor in several:
        ray.kill(actor)
