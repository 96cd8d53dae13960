import os

import pytest
from ray._private import services

from nesa_ray.cluster.joining import choose, connect, this_machine
from nesa_ray.errors import InvalidTopology

OTHERS = "127.33.71.1:29114"  # a LocalCluster of another process


@pytest.mark.parametrize(
    ("last", "running", "chosen"),
    [
        (None, (), None),
        (None, (OTHERS,), None),
        ("10.0.0.1:6379", ("10.0.0.1:6379", OTHERS), "10.0.0.1:6379"),
        ("10.0.0.1:6379", ("10.0.0.1:6379", "10.0.0.1:7000"), "10.0.0.1:6379"),
        ("10.0.0.1:6379", ("10.0.0.1:7000",), "10.0.0.1:7000"),
        ("10.0.0.1:6379", (), "10.0.0.1:6379"),  # it may be over, then joining it says so
        ("10.0.0.1:6379", (OTHERS,), "10.0.0.1:6379"),
        (None, ("127.0.0.1:6379", OTHERS), "127.0.0.1:6379"),
    ],
)
def test_the_cluster_to_join(last: str | None, running: tuple[str, ...], chosen: str | None) -> None:
    assert choose(last, running) == chosen


def test_of_several_clusters_one_has_to_be_named() -> None:
    with pytest.raises(InvalidTopology, match=r"name one in RAY_ADDRESS: 10\.0\.0\.1:7000, 10\.0\.0\.1:8000"):
        choose(None, ("10.0.0.1:8000", "10.0.0.1:7000"))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    ("address", "why"),
    [("127.0.0.1:1", "Connection refused"), ("junk", "Invalid address format"), ("local", "needs host:port")],
)
def test_a_named_cluster_that_cannot_be_joined_is_an_error(
    monkeypatch: pytest.MonkeyPatch, address: str, why: str, start: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InvalidTopology, match=rf"Ray cluster at {address} can't be joined \(RAY_ADDRESS .*{why}"):
        connect(start=start)


def test_without_a_cluster_and_not_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setattr(services, "_find_address_from_flag", lambda _: set())
    with pytest.raises(InvalidTopology, match=r"no live Ray cluster\. Start one"):
        connect()


def test_this_machine_is_one_node_of_all_its_cores() -> None:
    machine = this_machine()
    assert machine.devices is None
    assert machine.resolved_cores() == (tuple(sorted(os.sched_getaffinity(0))),)
    assert machine.memory_bytes > 1e8
