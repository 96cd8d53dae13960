"""Preparation: what becomes one item, and what can't be placed."""

import re

import pytest

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import Infeasible
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.problem import prepare, strongly_connected


def topology(*devices: dict, bytes_per_s: float = 1.0) -> Topology:
    given = [{"id": f"d{i}", "memory_bytes": 100, **d} for i, d in enumerate(devices)]
    return Topology.from_dict({"devices": given, "links": {"default": {"bytes_per_s": bytes_per_s}}})


def graph(nodes: dict[str, dict], edges: list[str]) -> Graph:
    full = [{"id": i, "compute_s": {"gpu": 1}, "output_bytes": 1, **n} for i, n in nodes.items()]
    return Graph.from_dict({"nodes": full, "edges": [list(e) for e in edges]})


def items(g: Graph, t: Topology | None = None, **options) -> list[set]:
    t = t or topology({}, {})
    problem = prepare(g, t, [(d.id,) for d in t.devices], **options)
    return [{g.nodes[i].id for i in members} for members in problem.members]


def test_strongly_connected_sets() -> None:
    after = {0: [1], 1: [2, 3], 2: [0], 3: [4], 4: [], 5: [4, 0]}
    component = strongly_connected(after)
    assert component[0] == component[1] == component[2]
    assert len({component[v] for v in (0, 3, 4, 5)}) == 4


def test_a_path_has_no_cycles() -> None:
    assert len(items(graph({c: {} for c in "abcdef"}, ["ab", "bc", "ac", "cd", "de", "df"]))) == 6


def test_colocation_that_makes_a_cycle_takes_what_is_between() -> None:
    g = graph({"a": {"colocate": 1}, "b": {}, "c": {"colocate": 1}, "d": {}}, ["ab", "bc", "cd"])
    assert sorted(map(sorted, items(g))) == [["a", "b", "c"], ["d"]]


def test_backward_nodes_follow_their_forward_nodes_and_make_no_order() -> None:
    g = graph(
        {"a": {"colocate": 1}, "b": {"colocate": 2}, "B": {"colocate": 2, "backward": True},
         "A": {"colocate": 1, "backward": True}},
        ["ab", "bB", "BA"],
    )  # fmt: skip
    problem = prepare(g, topology({}, {}), [("d0",), ("d1",)])
    assert problem.n == 2
    assert problem.after[1].tolist() == [1]
    assert sorted(zip(problem.producer.tolist(), problem.pins[1].tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_nodes_that_cost_nothing_join_their_only_neighbour() -> None:
    free = {"compute_s": {"gpu": 0}}
    g = graph({"w": free, "a": {}, "v": free, "b": {}, "s": free}, ["wa", "av", "vb", "bs"])
    assert sorted(map(sorted, items(g))) == [["a", "v", "w"], ["b", "s"]]
    assert len(items(g, contract=False)) == 5


def test_a_free_node_that_grows_its_input_stays_apart() -> None:
    g = graph({"a": {}, "v": {"compute_s": {"gpu": 0}, "output_bytes": 5}, "b": {}}, ["av", "vb"])
    assert len(items(g)) == 3


def test_a_tensor_counts_once_for_each_consumer() -> None:
    problem = prepare(graph({c: {} for c in "abc"}, ["ab", "ac", "ab"]), topology({}, {}), [("d0",), ("d1",)])
    assert problem.producer.tolist() == [0]
    assert problem.pins[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("nodes", "devices", "message"),
    [
        ({"a": {"compute_s": {"tpu": 1}}}, [{}], "node a can run on no device; the cluster has kinds gpu"),
        ({"a": {"memory_bytes": 150}}, [{}], "node a needs 150 bytes; the largest device that can run it has 100"),
        (
            {"a": {"memory_bytes": 90}, "b": {"memory_bytes": 90}, "c": {"memory_bytes": 90}},
            [{}, {}],
            "memory: the graph needs 270 bytes, all devices together have 200",
        ),
    ],
)  # fmt: skip
def test_what_fits_nowhere_is_named(nodes: dict, devices: list, message: str) -> None:
    t = topology(*devices)
    with pytest.raises(Infeasible, match=re.escape(message)):
        prepare(graph(nodes, []), t, [(d.id,) for d in t.devices])
