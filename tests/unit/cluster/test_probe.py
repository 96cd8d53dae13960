"""Which devices there are, by what Ray says of its nodes."""

from typing import Any

import pytest

from nesa_ray.cluster.probe import _parts, _slots, names
from nesa_ray.errors import InvalidTopology


def node(cpus: int = 0, gpus: int = 0, host: str = "host", identity: str = "id", **labels: str) -> dict[str, Any]:
    """An entry of ray.nodes()."""
    return {
        "NodeID": identity,
        "NodeManagerHostname": host,
        "Alive": True,
        "Resources": {"CPU": float(cpus), "GPU": float(gpus), "memory": 12e9},
        "Labels": {k.replace("_", "-"): v for k, v in labels.items()},
    }


LABELLED = node(8, nesa_cores="0-3.4-7")


@pytest.mark.parametrize(
    ("nodes", "devices", "parts"),
    [
        ({"a": node(2)}, 1, {"a": 1}),
        ({"a": node(2)}, 2, {"a": 2}),
        ({"a": node(2)}, 4, {"a": 2}),  # one for each Ray CPU at most
        ({"a": node(2)}, 0, {"a": 1}),
        ({"a": node(3)}, 2, {"a": 2}),
        ({"a": node(2), "b": node(16)}, 2, {"a": 1, "b": 1}),
        ({"a": node(2), "b": node(16)}, 4, {"a": 1, "b": 3}),  # the largest devices are divided
        ({"a": node(2), "b": node(16)}, 99, {"a": 2, "b": 16}),
        ({"a": node(4), "b": node(4)}, 4, {"a": 2, "b": 2}),
        ({"a": LABELLED}, 4, {}),
        ({"a": LABELLED, "b": node(4)}, 3, {"b": 1}),
        ({"a": LABELLED, "b": node(4)}, 4, {"b": 2}),
        ({"a": node(8, gpus=2)}, 4, {}),
        ({"a": node(8, gpus=2), "b": node(4)}, 4, {"b": 2}),
        ({"a": node(0)}, 4, {}),
        ({"a": node(4)}, ("a/cpu0of4", "a/cpu3of4"), {"a": 4}),  # as a plan's devices say
        ({"a": node(4)}, ("a/cpu0",), {"a": 1}),
        ({"a": node(2)}, ("a/cpu0of4",), {"a": 1}),  # made for a larger one: isn't there
        ({"a": node(2)}, ("a/cpu0of0", "b/cpu0of2", "a/gpu0"), {"a": 1}),
        ({"a": LABELLED}, ("a/cpu0of2",), {}),
    ],
)
def test_into_how_many_devices_nodes_are_divided(
    nodes: dict[str, Any], devices: int | tuple[str, ...], parts: dict[str, int]
) -> None:
    found = _parts(nodes, devices)
    assert {name: n for name, n in found.items() if name in parts or n != 1} == parts


def test_devices_of_a_divided_node_share_its_memory() -> None:
    slots = _slots("a", node(5), 3)
    assert [s.id for s in slots] == ["a/cpu0of3", "a/cpu1of3", "a/cpu2of3"]
    assert [s.memory_bytes for s in slots] == [4e9] * 3
    assert [s.n_cores for s in slots] == [1, 2, 2]
    (whole,) = _slots("a", node(5))
    assert (whole.id, whole.memory_bytes, whole.n_cores, whole.cores) == ("a/cpu0", 12e9, 5, ())


def test_a_label_or_gpus_say_what_the_devices_are() -> None:
    assert [(s.id, s.cores, s.memory_bytes) for s in _slots("a", LABELLED, 3)] == [
        ("a/cpu0", (0, 1, 2, 3), 6e9),
        ("a/cpu1", (4, 5, 6, 7), 6e9),
    ]
    assert [(s.id, s.kind, s.n_cores) for s in _slots("a", node(8, gpus=2), 3)] == [
        ("a/gpu0", "gpu", 0),
        ("a/gpu1", "gpu", 0),
    ]
    assert _slots("a", node(0)) == []
    with pytest.raises(InvalidTopology, match=r"node a: nesa-niceness: needs 0 to 19, got '20'"):
        _slots("a", node(2, nesa_niceness="20"))


def test_nodes_are_named_by_label_by_host_or_by_their_id() -> None:
    labelled = node(2, host="x", identity="1", nesa_node="big")
    assert names([labelled, node(2, host="y", identity="2")]) == ["big", "y"]
    assert names([node(2, host="y", identity="2"), node(2, host="y", identity="3")]) == ["2", "3"]
    with pytest.raises(InvalidTopology, match=r"nesa-node: two live nodes are called 'big'"):
        names([labelled, node(2, host="y", identity="2", nesa_node="big")])
