"""The front door of the planner: (Graph, Topology) -> Plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from nesa_ray.cluster.topology import Device, Topology
from nesa_ray.errors import Infeasible, InvalidInput
from nesa_ray.graph.graph import Graph, Node, NodeId
from nesa_ray.planning.bounds import critical_path, raise_bound, simple_bound
from nesa_ray.planning.costing import derive_costs, reduction_factor
from nesa_ray.planning.ideals import slice_all_orders
from nesa_ray.planning.latency import least_latency
from nesa_ray.planning.moves import Assignment
from nesa_ray.planning.orders import order_by
from nesa_ray.planning.plan import Plan, Stage, check_assignment, cost_stages, latency_seconds
from nesa_ray.planning.problem import Problem, prepare
from nesa_ray.planning.search import BY_CP_SAT, NO_BOUND, Limits, Report, search

OBJECTIVES = ("throughput", "latency")
MAX_SECONDS = 15.0


def partition(
    graph: Graph,
    topology: Topology,
    objective: str = "throughput",
    mode: str = "inference",
    stages: int | None = None,
    replicas: int | str = 1,
    seed: int = 0,
    *,
    max_seconds: float = MAX_SECONDS,
    overlap: bool = False,
    zero: int = 0,
    local_steps: int = 1,
    micro_batches: int = 8,
    in_flight: int | None = None,
    recompute: bool = False,
    cache_tokens: int = 0,
    mixed_precision: bool = False,
    memory_margin: float = 0.0,
    seconds: Mapping[NodeId, Mapping[str, float]] | None = None,
    report: Report | None = None,
) -> Plan:
    """Cuts `graph` for the devices of `topology`.

    objective      "throughput" minimises the slowest stage, "latency" the end-to-end time of one sample
    mode           "training" derives the cost of the backward pass and the optimizer for a captured graph
    stages         fixes the number of stages; otherwise any number of the devices may be used
    replicas       devices of each stage, which share its micro-batches; "auto" chooses how many
    seed           makes the search repeatable, wherever it ends before `max_seconds`
    overlap        a stage costs the largest of receive, compute and send instead of their sum
    zero           ZeRO stage over a stage's replicas
    local_steps    steps between two agreements of replicas that train by themselves; 1: in every step
    micro_batches  of a step: the gradients of a stage's replicas are reduced once for so many
    in_flight      micro-batches whose saved activations a stage holds (training); by default as many as
                   stages, and no more than a step has
    recompute      keep no activations but recompute them in the backward pass
    cache_tokens   tokens of context, over all sequences, whose keys and values a served model keeps (inference)
    mixed_precision  the captured parameters are 16-bit copies of fp32 ones (training)
    memory_margin  part of each device's memory to leave free, 0 to 1
    seconds        measured times by node and kind of device (graph/measure.py), in place of flops and bytes
    report         called with (what improved, seconds of the best plan so far)

    Raises Infeasible when no plan fits, InvalidInput for an argument that makes no sense.
    """
    started = time.perf_counter()
    _check_arguments(objective, stages, replicas, max_seconds, memory_margin, micro_batches, cache_tokens)
    most = len(topology.devices) // (stages or 1)
    counts = [n for n in range(1, most + 1) if len(topology.devices) % n == 0 or n == most]
    counts = [int(replicas)] if replicas != "auto" else counts if objective == "throughput" else [1]
    if not counts or counts[0] > most:
        asked = 1 if replicas == "auto" else int(replicas)
        raise Infeasible(
            f"stages: {stages or 1} stages of {asked} devices need {asked * (stages or 1)} devices, "
            f"the cluster has {len(topology.devices)}"
        )
    if memory_margin:
        topology = replace(
            topology,
            devices=tuple(replace(d, memory_bytes=d.memory_bytes * (1 - memory_margin)) for d in topology.devices),
        )
    limits = Limits(deadline=started + 0.97 * max_seconds, stages=stages, overlap=overlap, seed=seed, report=report)
    found: list[tuple[tuple[Stage, ...], float, str, bool, Graph]] = []
    refused: Infeasible | None = None
    for left, count in zip(range(len(counts), 0, -1), counts, strict=True):
        costed = planned_costs(
            graph, topology, mode, stages=stages, replicas=count, zero=zero, local_steps=local_steps,
            micro_batches=micro_batches,
            in_flight=in_flight, recompute=recompute, cache_tokens=cache_tokens, mixed_precision=mixed_precision,
            seconds=seconds,
        )  # fmt: skip
        reduction = reduction_factor(zero, count, micro_batches, local_steps) if mode == "training" else 0.0
        share = replace(limits, deadline=time.perf_counter() + max(0.0, limits.left_s) / left)
        try:
            found.append((*_plan(costed, topology, count, objective, share, reduction), costed))
        except Infeasible as e:
            refused = refused or e
    if not found:
        assert refused is not None
        raise refused
    best, bound, why, proved, costed = min(found, key=lambda f: _value(f[4], topology, f[0], objective))
    if len(counts) > 1:
        bound, why = min((f[1], f[2]) for f in found)
        proved = False
    check_assignment(costed, topology, best)
    latency = latency_seconds(costed, topology, best)
    achieved = latency if objective == "latency" else bottleneck_seconds(best)
    return Plan(
        objective=objective,
        mode=mode,
        overlap=overlap,
        stages=best,
        bottleneck_s=bottleneck_seconds(best),
        latency_s=latency,
        lower_bound_s=min(bound, achieved),
        bound_by=why,
        proved_optimal=proved or bound >= achieved * (1 - 1e-9),
        planning_s=time.perf_counter() - started,
    )


def planned_costs(
    graph: Graph,
    topology: Topology,
    mode: str,
    *,
    stages: int | None = None,
    replicas: int = 1,
    zero: int = 0,
    local_steps: int = 1,
    micro_batches: int = 8,
    in_flight: int | None = None,
    recompute: bool = False,
    cache_tokens: int = 0,
    mixed_precision: bool = False,
    seconds: Mapping[NodeId, Mapping[str, float]] | None = None,
) -> Graph:
    """The graph with the costs that `partition` plans for, given the same arguments."""
    in_flight = in_flight or min(micro_batches, stages or max(1, len(topology.devices) // replicas))
    return derive_costs(
        graph, mode, replicas=replicas, zero=zero, in_flight=in_flight, recompute=recompute, cache_tokens=cache_tokens,
        mixed_precision=mixed_precision, local_steps=local_steps, seconds=seconds,
    )  # fmt: skip


def pareto(graph: Graph, topology: Topology, **options: object) -> list[Plan]:
    """Plans that trade throughput for latency, the fastest pipeline first; none is worse than another in both."""
    plans = [partition(graph, topology, objective=o, **options) for o in OBJECTIVES]  # type: ignore[arg-type]
    for count in range(2, min(len(topology.devices), 6)):
        try:
            plans.append(partition(graph, topology, **{**options, "stages": count}))  # type: ignore[arg-type]
        except Infeasible:
            continue
    front = [
        p
        for p in plans
        if not any(
            (q.bottleneck_s, q.latency_s) != (p.bottleneck_s, p.latency_s)
            and q.bottleneck_s <= p.bottleneck_s * (1 + 1e-9)
            and q.latency_s <= p.latency_s * (1 + 1e-9)
            for q in plans
        )
    ]
    distinct = {(round(p.bottleneck_s, 12), round(p.latency_s, 12)): p for p in front}
    return sorted(distinct.values(), key=lambda p: p.bottleneck_s)


def warm_up() -> None:
    """Compiles the planner's machine code, which is then kept on disk: a few seconds, once for an installation."""
    nodes = tuple(Node(id=i, compute_s={"cpu": 1.0 + i}, output_bytes=1.0) for i in range(4))
    graph = Graph(nodes, ((0, 1), (0, 2), (1, 3), (2, 3)))
    topology = Topology(tuple(Device(id=str(i), kind="cpu") for i in range(2)))
    for objective in OBJECTIVES:
        partition(graph, topology, objective)
    slice_all_orders(prepare(graph, topology, device_groups(topology, 1)[0]), 1.0)


def bottleneck_seconds(stages: Sequence[Stage]) -> float:
    """The largest stage cost over its replicas."""
    return max(s.period_s for s in stages)


def device_groups(topology: Topology, replicas: int) -> list[list[tuple[str, ...]]]:
    """Ways to form units of `replicas` devices: neighbours by speed, by memory, and within hosts."""
    devices = list(topology.devices)
    if replicas == 1:
        return [[(d.id,) for d in devices]]
    keys: list[Callable[[Device], tuple]] = [
        lambda d: (-d.flops_per_s, -d.memory_bytes, d.node),
        lambda d: (-d.memory_bytes, -d.flops_per_s, d.node),
        lambda d: (d.node, -d.flops_per_s, -d.memory_bytes),
        lambda d: (d.kind, -d.flops_per_s, -d.memory_bytes, d.node),
    ]
    found: list[list[tuple[str, ...]]] = []
    for key in keys:
        ordered = sorted(devices, key=key)
        units = [
            tuple(d.id for d in ordered[i : i + replicas]) for i in range(0, len(ordered) - replicas + 1, replicas)
        ]
        if units not in found:
            found.append(units)
    return found


def _check_arguments(
    objective: str,
    stages: int | None,
    replicas: int | str,
    max_seconds: float,
    memory_margin: float,
    micro_batches: int,
    cache_tokens: int,
) -> None:
    if objective not in OBJECTIVES:
        raise InvalidInput(f"objective: needs one of {', '.join(OBJECTIVES)}, got {objective!r}")
    for name, value in (("stages", stages), ("replicas", replicas), ("micro_batches", micro_batches)):
        if value is None and name == "stages":
            continue
        if value == "auto" and name == "replicas":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"{name}: needs an integer ≥ 1, got {value!r}")
    if not max_seconds > 0 or math.isinf(max_seconds):
        raise InvalidInput(f"max_seconds: needs a number > 0, got {max_seconds}")
    if isinstance(cache_tokens, bool) or not isinstance(cache_tokens, int) or cache_tokens < 0:
        raise InvalidInput(f"cache_tokens: needs an integer ≥ 0, got {cache_tokens!r}")
    if not 0 <= memory_margin < 1:
        raise InvalidInput(f"memory_margin: needs a number from 0 to below 1, got {memory_margin}")


def _plan(
    costed: Graph, topology: Topology, replicas: int, objective: str, limits: Limits, reduction: float
) -> tuple[tuple[Stage, ...], float, str, bool]:
    """(stages, lower bound, why, proved) of the best way to group the devices into units."""
    groups = device_groups(topology, replicas)
    best: tuple[Stage, ...] | None = None
    refused: Infeasible | None = None
    bound, why = simple_bound(prepare(costed, topology, [(d.id,) for d in topology.devices]), limits.stages, replicas)
    shared, shared_why = bound, why
    proved = False
    for left, units in zip(range(len(groups), 0, -1), groups, strict=True):
        share = replace(limits, deadline=time.perf_counter() + max(0.0, limits.left_s) / left)
        try:
            problem = prepare(
                costed, topology, units, forward_only=objective == "latency", contract=limits.stages is None,
                reduction=reduction if objective == "throughput" else 0.0,
            )  # fmt: skip
            if objective == "latency":
                path, longest = critical_path(problem), "the longest path, every node on its fastest device"
                bound, why = (path, longest) if path >= shared else (shared, shared_why)
                assignment = least_latency(problem, share, bound)
            else:
                found = search(problem, share)
                assignment = found.assignment
                whole = len(groups) == 1 and len(units) * replicas == len(topology.devices) and replicas == 1
                if whole:
                    proved = found.proved
                    if found.bound_s > bound:
                        bound, why = found.bound_s, found.bound_by
                    if not proved and problem.n * len(problem.units) <= NO_BOUND:
                        bound, why = _raise(problem, bound, why, assignment.cost_s, limits)
        except Infeasible as e:
            refused = refused or e
            continue
        stages = stages_of(problem, assignment, overlap=limits.overlap, reduction=reduction)
        if best is None or _value(costed, topology, stages, objective) < _value(costed, topology, best, objective):
            best = stages
    if best is None:
        assert refused is not None
        raise refused
    return best, bound, why, proved


def _raise(problem: Problem, bound: float, why: str, best_s: float, limits: Limits) -> tuple[float, str]:
    """A better bound, in what is left of the time."""
    raised = raise_bound(
        problem, bound, best_s, seconds=limits.left_s, stages=limits.stages, overlap=limits.overlap, seed=limits.seed
    )
    return (raised, BY_CP_SAT) if raised > bound else (bound, why)


def stages_of(problem: Problem, assignment: Assignment, *, overlap: bool, reduction: float = 0.0) -> tuple[Stage, ...]:
    """The contract's stages of an assignment, costed."""
    order = order_by(problem, np.arange(problem.n, dtype=float), assignment.position)
    stages = problem.stages(assignment.unit_of, order.tolist())
    return cost_stages(problem.graph, problem.topology, stages, overlap=overlap, reduction=reduction)


def _value(graph: Graph, topology: Topology, stages: tuple[Stage, ...], objective: str) -> float:
    return latency_seconds(graph, topology, stages) if objective == "latency" else bottleneck_seconds(stages)
