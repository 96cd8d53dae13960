"""What people read: plans, clusters and runs as tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nesa_ray.cluster.topology import Topology
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.plan import Plan

FILE_WIDTH = 140  # columns when the output isn't a terminal


def write(what: RenderableType) -> None:
    """Prints to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(what)


def plan_table(plan: Plan, graph: Graph, topology: Topology) -> RenderableType:
    """Every stage with its devices, nodes, parameters, memory and times; the bottleneck, the bound and the gap.

    `graph` holds the nodes' parameter bytes.
    """
    table = Table(title=f"plan for {plan.objective}, {plan.mode}", title_justify="left")
    columns = (
        "stage",
        "devices",
        "nodes",
        "parameters",
        "memory",
        "of",
        "compute",
        "send",
        "receive",
        "per micro-batch",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "devices" else "right")
    for s in plan.stages:
        room = min(topology.device[d].memory_bytes for d in s.devices)
        table.add_row(
            str(s.id), ", ".join(s.devices), str(len(s.nodes)),
            size(sum(graph.node[n].param_bytes for n in s.nodes)), size(s.memory_bytes), size(room),
            seconds(s.compute_s), seconds(s.send_s), seconds(s.receive_s), seconds(s.period_s),
        )  # fmt: skip
    proof = "proved optimal" if plan.proved_optimal else f"at most {plan.gap:.1%} above the best"
    bound = f"lower bound {seconds(plan.lower_bound_s)}   gap {plan.gap:.2%} ({proof})   " if plan.lower_bound_s else ""
    line = Text(
        f"bottleneck {seconds(plan.bottleneck_s)}   latency {seconds(plan.latency_s)}   {bound}"
        f"planned in {seconds(plan.planning_s)}"
    )
    return Group(table, line)


def pareto_table(plans: Sequence[Plan]) -> RenderableType:
    """Plans that trade throughput for latency."""
    table = Table(title="throughput against latency", title_justify="left")
    for name in ("stages", "bottleneck", "latency", "micro-batches a second"):
        table.add_column(name, justify="right")
    for p in plans:
        rate = 1 / p.bottleneck_s if p.bottleneck_s else float("inf")
        table.add_row(str(len(p.stages)), seconds(p.bottleneck_s), seconds(p.latency_s), f"{rate:.4g}")
    return table


@contextmanager
def telling(what: str) -> Iterator[None]:
    """A spinner while something takes its time, and how long it took."""
    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    with console.status(f"{what} ..."):
        yield
    console.print(f"{what}: {time.monotonic() - began:.1f} s")


@contextmanager
def planning_progress(max_seconds: float) -> Iterator[Callable[[str, float], None]]:
    """On a terminal, shows the best plan so far from two seconds on; gives what the planner reports to."""
    console = Console(stderr=True)
    started = time.monotonic()
    best = [float("inf")]
    with console.status("") if console.is_terminal else nullcontext() as status:
        if status is not None:
            status.stop()

        def report(what: str, value: float) -> None:
            best[0] = min(best[0], value)
            elapsed = time.monotonic() - started
            if status is not None and elapsed > 2:
                status.start()
                status.update(
                    f"planning: best {seconds(best[0])}, {elapsed:.0f} of at most {max_seconds:.0f} s ({what})"
                )

        yield report


def topology_table(topology: Topology) -> RenderableType:
    """Devices and links."""
    devices = Table(title="devices", title_justify="left")
    for name in ("device", "kind", "node", "memory", "speed", "memory bandwidth", "cores"):
        devices.add_column(name)
    for d in topology.devices:
        speed = f"{d.flops_per_s / 1e9:.1f} Gflop/s" if d.flops_per_s else "?"
        bandwidth = f"{size(d.memory_bytes_per_s)}/s" if d.memory_bytes_per_s else "?"
        cores = " ".join(map(str, d.cores)) + (f" (nice {d.niceness})" if d.niceness else "")
        devices.add_row(d.id, d.kind, d.node, size(d.memory_bytes), speed, bandwidth, cores)
    links = Table(title="links", title_justify="left")
    for name in ("between", "bandwidth", "latency"):
        links.add_column(name)
    named: list[tuple[str, Any]] = [(" - ".join(sorted(ends)), link) for ends, link in topology.pairs.items()]
    for name, link in [*named, ("any others", topology.default)]:
        links.add_row(name, f"{size(link.bytes_per_s)}/s", seconds(link.latency_s))
    return Group(devices, links)


def training_table(result: Any) -> RenderableType:
    """A TrainResult: losses, speed, and each stage's predicted against measured time."""
    table = Table(title="one micro-batch, forward and backward", title_justify="left")
    for name in ("stage", "predicted", "measured", "measured / predicted"):
        table.add_column(name, justify="right")
    for s in result.stages:
        table.add_row(
            str(s.stage), seconds(s.predicted_s), seconds(s.measured_s), f"{s.measured_s / s.predicted_s:.2f}"
        )
    step = result.predicted_step_s, result.step_s
    table.add_row("a whole step", seconds(step[0]), seconds(step[1]), f"{step[1] / step[0]:.2f}")
    held_out = "" if result.held_out_loss is None else f"   held-out loss {result.held_out_loss:.3f} nats per token"
    line = Text(
        f"{result.steps} steps   loss {result.loss:.3f}{held_out}   {result.tokens_per_s:.0f} tokens/s   "
        f"pipeline efficiency {result.efficiency:.0%}   "
        f"{size(result.sent_bytes_per_step)} sent between stages per step\nmodel saved in {result.model}"
    )
    return Group(table, line)


def seconds(value: float) -> str:
    """3 significant digits, in s, ms or µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return "0" if value < 1e-9 else f"{value / 1e-9:.3g} ns"


def size(value: float) -> str:
    """3 significant digits, in B, kB, MB, GB or TB (powers of 1000)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return "∞" if value == float("inf") else f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
