import pytest

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible, InvalidPlan, InvalidTopology
from nesa_ray.runtime.placement import place, seats
from tests.unit.models import plan_on

TOPOLOGY = Topology(
    (
        Device(id="a/cpu0", kind="cpu", node="a", cores=(0, 1), niceness=3),
        Device(id="a/cpu1", kind="cpu", node="a", cores=(2,)),
        Device(id="b/gpu0", kind="gpu", node="b"),
        Device(id="b/gpu1", kind="gpu", node="b"),
    )
)
LIVE = {
    "a": {"NodeID": "1a", "Resources": {"CPU": 3.0, "memory": 1e9}},
    "b": {"NodeID": "1b", "Resources": {"CPU": 8.0, "GPU": 2.0}},
}


def test_one_seat_per_replica_in_the_order_of_the_plan() -> None:
    taken = seats(plan_on(("b/gpu1", "a/cpu0"), ("a/cpu1",)), TOPOLOGY, LIVE)
    assert [(s.stage, s.replica, s.bundle, s.device.id, s.node_id, s.resources) for s in taken] == [
        (0, 0, 0, "b/gpu1", "1b", {"GPU": 1}),
        (0, 1, 1, "a/cpu0", "1a", {"CPU": 2}),
        (1, 0, 2, "a/cpu1", "1a", {"CPU": 1}),
    ]


@pytest.mark.parametrize(
    ("stages", "live", "error", "message"),
    [
        ((("c/cpu0",),), LIVE, InvalidPlan, r"stage 0: devices: the topology has no device 'c/cpu0'"),
        ((("b/gpu0",),), {"a": LIVE["a"]}, InvalidTopology, r"stage 0: needs node 'b', the live nodes are a"),
        ((("b/gpu0",),), {}, InvalidTopology, r"stage 0: needs node 'b', the live nodes are none"),
        (
            (("b/gpu0",), ("b/gpu1",)),
            {"b": {"NodeID": "1b", "Resources": {"CPU": 8.0, "GPU": 1.0}}},
            Infeasible,
            r"node b: the plan needs 2 GPU, the node has 1",
        ),
        (
            (("a/cpu0", "a/cpu1"),),
            {"a": {"NodeID": "1a", "Resources": {"CPU": 2.0}}},
            Infeasible,
            r"node a: the plan needs 3 CPU, the node has 2",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_live_cluster(
    stages: tuple, live: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        seats(plan_on(*stages), TOPOLOGY, live)


def test_placing_without_a_cluster() -> None:
    with pytest.raises(InvalidTopology, match="needs a live Ray cluster"):
        place(plan_on(("a/cpu0",)), TOPOLOGY)
