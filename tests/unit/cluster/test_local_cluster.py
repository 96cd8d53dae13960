import contextlib
import os
import socket
from pathlib import Path

import pytest

from nesa_ray.cluster.local import LocalCluster, LocalNode, free_ports, node_environment, ray_start
from nesa_ray.errors import InvalidTopology


def test_devices_get_one_core_each_by_default() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    cores = LocalNode(name="n", devices=3).resolved_cores()
    assert cores == tuple((allowed[i % len(allowed)],) for i in range(3))


def test_a_node_for_the_probe_to_divide_has_all_cores_and_no_label_of_them() -> None:
    node, allowed = LocalNode(name="n", devices=None, memory_bytes=3e9), sorted(os.sched_getaffinity(0))
    cores = node.resolved_cores()
    assert cores == (tuple(allowed),)
    argv = ray_start(node, cores, "127.1.1.1", 1)
    assert f"--num-cpus={len(allowed)}" in argv
    assert "--memory=3000000000" in argv
    assert "--labels=nesa-node=n,nesa-niceness=0" in argv


@pytest.mark.parametrize(("visible", "numbers"), [(None, "1,2"), ("", "1,2"), ("3,5,GPU-7", "5,GPU-7")])
def test_gpus_are_numbered_as_this_process_sees_them(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, numbers: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment = node_environment(LocalNode(name="n", gpus=(1, 2)), {"RAY_ADDRESS": "x"})
    assert environment["CUDA_VISIBLE_DEVICES"] == numbers


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            LocalNode(name="n", devices=None, cores=((0,),)),
            r"node n: cores: needs a number of devices, got \(\(0,\),\)",
        ),
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
