"""Whether to pipeline at all, and how often replicas should agree: from a plan's predicted times."""

from __future__ import annotations

import math
from typing import Any

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import InvalidPlan
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.costing import reduction_factor
from nesa_ray.planning.partition import device_groups, planned_costs
from nesa_ray.planning.plan import Plan, Stage, check_assignment, cost_stages

SYNC_SHARE = 0.05
LEAST_LOCAL_STEPS = 32


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


def local_steps(plan: Plan, step_s: float, *, replicas: int, micro_batches: int) -> int | None:
    """Steps between two agreements of the replicas, where keeping them in step takes too long; None where it doesn't.

    step_s  of a pipeline by itself, by simulation; what ZeRO sends in a step may add SYNC_SHARE to it, for part of it
            overlaps the last backwards.  Beyond that replicas agree as often as half of the link's time allows, and no
            more than every LEAST_LOCAL_STEPS steps: the literature's runs lose nothing at a hundred and more (DiLoCo,
            arXiv 2311.08105).
    """
    sync_s = micro_batches * max(s.sync_s for s in plan.stages)
    if sync_s <= SYNC_SHARE * step_s:
        return None
    ratio = reduction_factor(0, replicas, 1, 2) * 2 / reduction_factor(0, replicas, 1)
    return max(LEAST_LOCAL_STEPS, math.ceil(2 * sync_s * ratio / step_s))


def one_stage(
    graph: Graph, topology: Topology, *, replicas: int = 1, zero: int = 0, micro_batches: int = 8, local_steps: int = 1,
    **options: Any,
) -> Stage | None:  # fmt: skip
    """The whole graph in training on the fastest devices that it fits; None where there are none."""
    costed = planned_costs(
        graph, topology, "training", stages=1, replicas=replicas, zero=zero, micro_batches=micro_batches,
        local_steps=local_steps, **options,
    )  # fmt: skip
    fitting: list[Stage] = []
    for unit in {unit for units in device_groups(topology, replicas) for unit in units}:
        whole = (Stage(id=0, devices=unit, nodes=costed.order),)
        try:
            check_assignment(costed, topology, whole)
        except InvalidPlan:
            continue
        reduction = reduction_factor(zero, replicas, micro_batches, local_steps)
        fitting += cost_stages(costed, topology, whole, reduction=reduction)
    return min(fitting, key=lambda s: (s.compute_s + s.sync_s, s.devices), default=None)
