import contextlib
import os
import socket
from pathlib import Path

import pytest

from nesa_ray.cluster.local import LocalCluster, LocalNode, free_ports
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


def test_a_free_port_is_free_on_every_address_and_given_to_nobody_who_asks_for_any() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    with contextlib.ExitStack() as open_sockets:
        taken = []
        for port in free_ports(200):
            taken.append(open_sockets.enter_context(socket.create_server(("127.8.7.6", port))).getsockname()[1])
        others = free_ports(40_000)
        assert len(taken) == len(set(taken)) == 200
        assert len(others) == len(set(others))
        assert not set(taken) & set(others)
        assert low <= 20_000 or not any(low <= port <= high for port in (*taken, *others))
