"""The front door of the planner: (Graph, Topology) -> Plan."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible, InvalidInput
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.choices import by_class, by_sequence, states_by_class
from nesa_ray.planning.costing import derive_costs
from nesa_ray.planning.plan import Plan, Stage, cost_stages, latency_seconds
from nesa_ray.planning.problem import Problem, prepare
from nesa_ray.planning.slicing import Slicer

OBJECTIVES = ("throughput", "latency")
MAX_STATES = 512


def partition(
    graph: Graph,
    topology: Topology,
    objective: str = "throughput",
    mode: str = "inference",
    stages: int | None = None,
    replicas: int = 1,
    seed: int = 0,
    *,
    overlap: bool = False,
    zero: int = 0,
    in_flight: int | None = None,
) -> Plan:
    """Cuts `graph` for the devices of `topology`.

    objective  "throughput" minimises the slowest stage, "latency" the end-to-end time of one sample
    mode       "training" derives the cost of the backward pass and the optimizer for a captured graph
    stages     fixes the number of stages; otherwise any number of the devices may be used
    replicas   devices of each stage, which share its micro-batches
    seed       makes the search repeatable
    overlap    a stage costs the largest of receive, compute and send instead of their sum
    zero       ZeRO stage over a stage's replicas
    in_flight  micro-batches whose saved activations a stage holds (training); by default as many as there are stages

    Raises Infeasible when no plan fits, InvalidInput for an argument that makes no sense.
    """
    started = time.perf_counter()
    if objective not in OBJECTIVES:
        raise InvalidInput(f"objective: needs one of {', '.join(OBJECTIVES)}, got {objective!r}")
    for name, value in (("stages", stages), ("replicas", replicas)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidInput(f"{name}: needs an integer ≥ 1, got {value!r}")
    needed = replicas * (stages or 1)
    if needed > len(topology.devices):
        raise Infeasible(
            f"stages: {stages or 1} stages of {replicas} devices need {needed} devices, "
            f"the cluster has {len(topology.devices)}"
        )
    in_flight = in_flight or stages or len(topology.devices) // replicas
    costed = derive_costs(graph, mode, replicas=replicas, zero=zero, in_flight=in_flight)
    best: tuple[Stage, ...] | None = None
    refused: Infeasible | None = None
    for units in device_groups(topology, replicas):
        try:
            problem = prepare(costed, topology, units)
        except Infeasible as e:
            refused = refused or e
            continue
        found = _best_slicing(problem, stages, overlap)
        if found is not None and (best is None or bottleneck_seconds(found) < bottleneck_seconds(best)):
            best = found
    if best is None:
        raise refused or Infeasible(_why_not(costed, topology, stages))
    bound = lower_bound_seconds(costed, topology, replicas)
    return Plan(
        objective=objective,
        mode=mode,
        overlap=overlap,
        stages=best,
        bottleneck_s=bottleneck_seconds(best),
        latency_s=latency_seconds(costed, topology, best),
        lower_bound_s=bound,
        bound_by="largest node, or all work over all devices",
        planning_s=time.perf_counter() - started,
    )


def bottleneck_seconds(stages: Sequence[Stage]) -> float:
    """The largest stage cost over its replicas."""
    return max(s.period_s for s in stages)


def lower_bound_seconds(graph: Graph, topology: Topology, replicas: int) -> float:
    """No bottleneck is below the largest node on its fastest device, or all work over all devices."""
    problem = prepare(graph, topology, [(d.id,) for d in topology.devices])
    each = problem.time_s.min(axis=0)
    if problem.n == 1:
        return float(each[0]) / replicas
    types = problem.unit_types[1]
    # In a second, device d does at most max over items of fastest time / its time, of the work in fastest seconds.
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(problem.time_s > 0, each / problem.time_s, 0.0).max(axis=1)
    speed = float(rate[types].sum())
    shared = float(each.sum()) / speed if speed else 0.0
    return max(float(each.max()) / replicas, shared)


def device_groups(topology: Topology, replicas: int) -> list[list[tuple[str, ...]]]:
    """Ways to form units of `replicas` devices: neighbours by speed, by memory, and within hosts."""
    devices = list(topology.devices)
    if replicas == 1:
        return [[(d.id,) for d in devices]]
    keys = [
        lambda d: (-d.flops_per_s, -d.memory_bytes, d.node),
        lambda d: (-d.memory_bytes, -d.flops_per_s, d.node),
        lambda d: (d.node, -d.flops_per_s, -d.memory_bytes),
        lambda d: (d.kind, -d.flops_per_s, -d.memory_bytes, d.node),
    ]
    found: list[list[tuple[str, ...]]] = []
    for key in keys:
        ordered: list[Device] = sorted(devices, key=key)
        units = [
            tuple(d.id for d in ordered[i : i + replicas]) for i in range(0, len(ordered) - replicas + 1, replicas)
        ]
        if units not in found:
            found.append(units)
    return found


def _best_slicing(problem: Problem, stages: int | None, overlap: bool) -> tuple[Stage, ...] | None:
    """The best slicing of a few natural orders."""
    if stages is not None and stages > problem.n:
        raise Infeasible(f"stages: {stages} stages asked for, the graph has {problem.n} nodes that can be separated")
    few = states_by_class(problem) <= MAX_STATES
    if few:
        choices = by_class(problem, stages)
    else:
        speed = [-float(problem.unit_time_s(u).max(axis=0).sum()) for u in range(len(problem.units))]
        sequence = sorted(range(len(problem.units)), key=lambda u: (int(problem.place[u]), -speed[u], u))
        choices = by_sequence(problem, sequence, stages)
    slicer = Slicer(problem, choices, overlap=overlap)
    best: tuple[Stage, ...] | None = None
    for order in (first_order(problem), depth_first_order(problem)):
        found = slicer.slice(order)
        if found is None:
            continue
        costed = cost_stages(
            problem.graph, problem.topology, problem.stages(found.unit_of, order.tolist()), overlap=overlap
        )
        if best is None or bottleneck_seconds(costed) < bottleneck_seconds(best):
            best = costed
    return best


def first_order(problem: Problem) -> np.ndarray:
    """The topological order of items nearest to the order of the graph's nodes."""
    return _kahn(problem, lambda ready: min(range(len(ready)), key=lambda i: ready[i]))


def depth_first_order(problem: Problem) -> np.ndarray:
    """A topological order that finishes a branch before it starts the next: the newest ready item goes first."""
    return _kahn(problem, lambda ready: len(ready) - 1)


def _kahn(problem: Problem, pick) -> np.ndarray:  # type: ignore[no-untyped-def]
    pointer, after = problem.after
    waiting = np.diff(problem.before[0]).tolist()
    ready = [v for v in range(problem.n) if not waiting[v]]
    order = []
    while ready:
        v = ready.pop(pick(ready))
        order.append(v)
        for w in after[pointer[v] : pointer[v + 1]].tolist():
            waiting[w] -= 1
            if not waiting[w]:
                ready.append(w)
    return np.array(order, dtype=np.int64)


def _why_not(graph: Graph, topology: Topology, stages: int | None) -> str:
    needed = sum(n.memory_bytes for n in graph.nodes)
    there = sum(d.memory_bytes for d in topology.devices)
    how = f"{stages} stages" if stages else f"up to {len(topology.devices)} stages"
    return (
        f"memory: no cut of the graph into {how} fits the devices' memories "
        f"(the graph needs {needed:.0f} bytes in all, the devices have {there:.0f})"
    )
