"""Whether to pipeline at all: a plan's training step against the step of one stage."""

from __future__ import annotations

from typing import Any

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import Infeasible
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.partition import partition
from nesa_ray.planning.plan import Plan

_MAX_SECONDS = 2.0


def dont_pipeline(
    graph: Graph, topology: Topology, plan: Plan, schedule_s: float, *, micro_batches: int, **options: Any
) -> str | None:
    """One line that says so when one stage, on the fastest devices that it fits, takes no longer than the pipeline.

    schedule_s  the plan's shortest schedule, by simulation; what keeps replicas equal is added here, on both sides
    options     what `partition` made the plan with

    None: the pipeline is faster, or one stage fits nowhere.
    """
    if len(plan.stages) == 1:
        return f"one stage on {', '.join(plan.devices)}: the planner found no faster pipeline"
    try:
        alternative = partition(
            graph, topology, **{**options, "stages": 1, "micro_batches": micro_batches, "max_seconds": _MAX_SECONDS}
        )
    except Infeasible:
        return None
    (one,) = alternative.stages
    one_s = micro_batches * (one.compute_s + one.sync_s)
    step_s = schedule_s + micro_batches * max(s.sync_s for s in plan.stages)
    if one_s > step_s:
        return None
    return (
        f"don't pipeline: by simulation one stage on {', '.join(one.devices)} takes {one_s:.3g} s a step, "
        f"these {len(plan.stages)} stages {step_s:.3g} s (stages: 1)"
    )
