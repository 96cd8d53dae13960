"""When a plan's pipeline is slower than one stage."""

from nesa_ray.cluster.topology import Device, Link, Topology
from nesa_ray.graph.graph import Graph, Node
from nesa_ray.planning.advice import dont_pipeline
from nesa_ray.planning.partition import partition
from nesa_ray.planning.plan import Plan
from nesa_ray.planning.simulate import best_schedule, plan_times, plan_transfers

CHAIN = {0: {1}, 1: set()}


def advice(bytes_per_s: float, memory_bytes: float = 100.0) -> tuple[Plan, str | None]:
    """Four nodes of a second each, four micro-batches, two devices that each hold the bytes."""
    nodes = tuple(Node(id=i, compute_s={"cpu": 1.0}, output_bytes=1.0, memory_bytes=10.0) for i in range(4))
    graph = Graph(nodes, ((0, 1), (1, 2), (2, 3)))
    devices = tuple(Device(id=n, kind="cpu", memory_bytes=memory_bytes) for n in "ab")
    topology = Topology(devices, default=Link(bytes_per_s=bytes_per_s))
    options = {"mode": "training", "micro_batches": 4}
    plan = partition(graph, topology, stages=2, **options)
    step_s = best_schedule(CHAIN, 4, plan_times(plan), plan_transfers(plan, CHAIN)).step_s
    return plan, dont_pipeline(graph, topology, plan, step_s, **options)


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
