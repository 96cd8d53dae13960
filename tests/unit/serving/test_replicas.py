import pytest

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible
from nesa_ray.serving.replicas import WHOLE, Share


def test_every_device_is_in_one_share_and_shares_are_alike() -> None:
    devices = [f"node{i // 4}/cpu{i % 4}" for i in range(11)]
    for count in range(1, 12):
        shares = [Share(i, count).of(devices) for i in range(count)]
        assert [d for s in shares for d in s] == devices
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Share(1, 2).of(devices[:8]) == tuple(devices[4:8])  # a node is one share's
    with pytest.raises(Infeasible, match="3 pipelines need as many devices, the cluster has 2"):
        Share(0, 3).of(devices[:2])


def test_a_topology_is_restricted_to_the_share() -> None:
    topology = Topology(tuple(Device(id=f"cpu{i}", kind="cpu") for i in range(5)))
    assert [d.id for d in Share(1, 2).within(topology).devices] == ["cpu2", "cpu3", "cpu4"]
    assert WHOLE.within(topology) == topology
