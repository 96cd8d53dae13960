import os

import pytest

from nesa_ray.cluster.local import LocalCluster, LocalNode
from nesa_ray.errors import InvalidTopology


def test_devices_get_one_core_each_by_default() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    cores = LocalNode(name="n", devices=3).resolved_cores()
    assert cores == tuple((allowed[i % len(allowed)],) for i in range(3))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (LocalNode(name="n", devices=2, cores=((0,),)), r"node n: cores: needs one group per device, 2, got"),
        (
            LocalNode(name="n", devices=1, cores=((4095,),)),
            r"node n: cores: needs cores \[4095\], this process may use",
        ),
        (LocalNode(name="n", niceness=20), r"node n: niceness: needs 0 to 19, got 20"),
    ],
)
def test_nodes_that_cannot_be_emulated(node: LocalNode, message: str) -> None:
    with pytest.raises(InvalidTopology, match=message):
        LocalCluster([node])


def test_names_are_unique() -> None:
    with pytest.raises(InvalidTopology, match=r"nodes: needs at least one, each with a name of its own"):
        LocalCluster([LocalNode(name="a"), LocalNode(name="a")])


def test_haproxy_is_for_one_node() -> None:
    with pytest.raises(InvalidTopology, match=r"nodes: haproxy: needs a cluster of one node, got a, b"):
        LocalCluster([LocalNode(name="a"), LocalNode(name="b")], haproxy=True)
