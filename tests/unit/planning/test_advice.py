"""When a plan's pipeline is slower than one stage."""

from nesa_ray.cluster.topology import Device, Link, Topology
from nesa_ray.graph.graph import Graph, Node
from nesa_ray.planning.advice import dont_pipeline, one_stage
from nesa_ray.planning.partition import partition
from nesa_ray.planning.plan import Plan
from nesa_ray.planning.simulate import best_schedule, plan_times, plan_transfers, steady_step_s

CHAIN = {0: {1}, 1: set()}


def advice(bytes_per_s: float, memory_bytes: float = 100.0) -> tuple[Plan, str | None]:
    """Four nodes of a second each, four micro-batches, two devices that each hold the bytes."""
    nodes = tuple(Node(id=i, compute_s={"cpu": 1.0}, output_bytes=1.0, memory_bytes=10.0) for i in range(4))
    graph = Graph(nodes, ((0, 1), (1, 2), (2, 3)))
    devices = tuple(Device(id=n, kind="cpu", memory_bytes=memory_bytes) for n in "ab")
    topology = Topology(devices, default=Link(bytes_per_s=bytes_per_s))
    plan = partition(graph, topology, mode="training", stages=2, micro_batches=4)
    times, transfers = plan_times(plan), plan_transfers(plan, CHAIN)
    step_s = steady_step_s(best_schedule(CHAIN, 4, times, transfers), CHAIN, times, transfers)
    return plan, dont_pipeline(graph, topology, plan, step_s, micro_batches=4)


def test_fast_links_pipeline() -> None:
    assert advice(1e9)[1] is None


def test_slow_links_dont() -> None:
    line = advice(0.05)[1]
    assert line is not None
    assert line.startswith("don't pipeline: by simulation one stage on ")
    assert "takes 16 s a step, these 2 stages " in line


def test_what_fits_nowhere_else_is_pipelined() -> None:
    assert advice(0.05, memory_bytes=25.0)[1] is None


def test_transfers_are_half_of_what_is_received() -> None:
    plan, _ = advice(0.05)
    transfer = plan_transfers(plan, CHAIN)[0, 1]
    assert transfer.wire_s == plan.stages[1].receive_s / 2


def test_the_fastest_devices_that_the_whole_fits() -> None:
    """The fastest is too small; two replicas take the slower of their devices, and what keeps them equal."""
    nodes = tuple(Node(id=i, compute_s={"cpu": 1.0}, memory_bytes=10.0, param_bytes=5.0) for i in range(4))
    graph = Graph(nodes, ((0, 1), (1, 2), (2, 3)))
    sizes = {"fast": (4.0, 30.0), "middle": (2.0, 50.0), "slow": (1.0, 50.0)}
    devices = tuple(Device(id=n, kind="cpu", speed=s, memory_bytes=m) for n, (s, m) in sizes.items())
    topology = Topology(devices, default=Link(bytes_per_s=10.0))
    alone = one_stage(graph, topology)
    assert alone is not None
    assert (alone.devices, alone.compute_s) == (("middle",), 2.0)
    both = one_stage(graph, topology, replicas=2, micro_batches=4)
    assert both is not None
    assert (set(both.devices), both.compute_s, both.sync_s) == ({"middle", "slow"}, 4.0, 20.0 * 0.25 / 10.0)
