"""Interleaving (Narayanan et al., arXiv 2104.04473): several smaller stages on each device, so a pipeline fills sooner.

The stages go round a plan's devices: with p of them, stage i runs where the plan's stage i mod p does.
"""

from __future__ import annotations

from dataclasses import replace

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import Infeasible
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.choices import by_sequence
from nesa_ray.planning.orders import narrow_order
from nesa_ray.planning.plan import Plan, cost_stages, latency_seconds
from nesa_ray.planning.problem import prepare
from nesa_ray.planning.slicing import Slicer


def live_microbatches(devices: int, microbatches: int) -> int:
    """Micro-batches, in whole ones, whose saved activations a device may hold: one more than under 1F1B."""
    return min(microbatches, devices + 1)


def interleave(plan: Plan, graph: Graph, topology: Topology, per_device: int, *, reduction: float = 0.0) -> Plan:
    """`plan` with `per_device` stages on each of its devices, which repeat: for the Trainer, not for Plan.check.

    One order of the nodes is cut for the least slowest stage.  `graph` has the costs of what is to run (see
    partition.planned_costs and live_microbatches), `reduction` is as in cost_stages.  There is no bound.
    Raises Infeasible when no cut fits the devices' memory.
    """
    units = [s.devices for s in plan.stages] * per_device
    problem = prepare(graph, topology, units, contract=False, reduction=reduction)
    choices = by_sequence(problem, range(len(units)), len(units))
    order = narrow_order(problem)
    # A device holds the sum of its stages.  Where the fastest cut asks too much of one, each stage gets an even share.
    for share in (1.0, 1.0 / per_device):
        sharing = replace(problem, capacity_bytes=share * problem.capacity_bytes)
        found = Slicer(sharing, choices, overlap=plan.overlap).slice(order)
        if found is None:
            break
        cut = [replace(s, devices=units[s.id]) for s in problem.stages(found.unit_of, order.tolist())]
        stages = cost_stages(graph, topology, tuple(cut), overlap=plan.overlap, reduction=reduction)
        together = [stages[i :: len(plan.stages)] for i in range(len(plan.stages))]
        if all(
            sum(s.memory_bytes for s in mine) <= room * (1 + 1e-9)
            for mine, room in zip(together, problem.capacity_bytes, strict=False)
        ):
            return replace(
                plan, stages=stages, bottleneck_s=max(sum(s.period_s for s in mine) for mine in together),
                latency_s=latency_seconds(graph, topology, stages), lower_bound_s=0.0, proved_optimal=False,
                bound_by="",
            )  # fmt: skip
    raise Infeasible(
        f"stages_per_device: found no way to cut the graph into {len(plan.stages)} × {per_device} stages that fit the "
        f"memory of their devices, or it has fewer nodes"
    )
