"""Whether to pipeline at all: a plan's training step against the step of one stage."""

from __future__ import annotations

from typing import Any

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import InvalidPlan
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.costing import reduction_factor
from nesa_ray.planning.partition import device_groups, planned_costs
from nesa_ray.planning.plan import Plan, Stage, check_assignment, cost_stages


def dont_pipeline(
    graph: Graph, topology: Topology, plan: Plan, schedule_s: float, *, micro_batches: int, **options: Any
) -> str | None:
    """One line that says so when one stage, on the fastest devices that it fits, takes no longer than the pipeline.

    schedule_s  the plan's shortest schedule, by simulation; what keeps replicas equal is added here, on both sides
    options     replicas, zero, recompute and seconds, as `partition` was given them

    None: the pipeline is faster, or one stage fits nowhere.
    """
    if len(plan.stages) == 1:
        return f"one stage on {', '.join(plan.devices)}: the planner found no faster pipeline"
    one = one_stage(graph, topology, micro_batches=micro_batches, **options)
    if one is None:
        return None
    one_s = micro_batches * (one.compute_s + one.sync_s)
    step_s = schedule_s + micro_batches * max(s.sync_s for s in plan.stages)
    if one_s > step_s:
        return None
    return (
        f"don't pipeline: by simulation one stage on {', '.join(one.devices)} takes {one_s:.3g} s a step, "
        f"these {len(plan.stages)} stages {step_s:.3g} s (stages: 1)"
    )


def one_stage(
    graph: Graph, topology: Topology, *, replicas: int = 1, zero: int = 0, micro_batches: int = 8, **options: Any
) -> Stage | None:
    """The whole graph in training on the fastest devices that it fits; None where there are none."""
    costed = planned_costs(
        graph, topology, "training", stages=1, replicas=replicas, zero=zero, micro_batches=micro_batches, **options
    )
    fitting: list[Stage] = []
    for unit in {unit for units in device_groups(topology, replicas) for unit in units}:
        whole = (Stage(id=0, devices=unit, nodes=costed.order),)
        try:
            check_assignment(costed, topology, whole)
        except InvalidPlan:
            continue
        reduction = reduction_factor(zero, replicas, micro_batches)
        fitting += cost_stages(costed, topology, whole, reduction=reduction)
    return min(fitting, key=lambda s: (s.compute_s + s.sync_s, s.devices), default=None)
