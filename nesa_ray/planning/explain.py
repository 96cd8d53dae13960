"""Why a plan costs what it costs, and what would make it better."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nesa_ray.cluster.topology import Device, Link, Topology
from nesa_ray.errors import Infeasible
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.partition import partition
from nesa_ray.planning.plan import Plan, Stage, node_seconds


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor that crosses between stages: seconds of its slowest transfer."""

    producer: str
    seconds: float
    n_bytes: float
    to_stages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another plan: what was changed, and the objective that gives."""

    what: str
    seconds: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What bounds a plan.

    stage         the slowest stage
    parts         its compute, receive and send as shares of its cost
    fullest       (stage, share of its smallest device's memory) of the stage with the least memory left
    largest_node  (name, seconds on the stage's device)
    tensors       what the slowest stage sends and receives, the slowest first
    alternatives  the next-best cut, one more device, faster links: the objective that each would give
    """

    stage: int
    parts: dict[str, float]
    fullest: tuple[int, float]
    largest_node: tuple[str, float]
    tensors: tuple[Tensor, ...]
    alternatives: tuple[Alternative, ...]

    def lines(self) -> list[str]:
        """For people, a fact a line."""
        share = ", ".join(f"{name} {part:.0%}" for name, part in self.parts.items() if part > 0)
        out = [
            f"stage {self.stage} is the slowest: {share}",
            f"its largest node is {self.largest_node[0]}, {self.largest_node[1] * 1e3:.3g} ms",
            f"stage {self.fullest[0]} is the fullest: {self.fullest[1]:.0%} of its memory",
        ]
        for t in self.tensors[:3]:
            out.append(
                f"{t.producer} ({t.n_bytes / 1e6:.3g} MB) crosses to stage "
                f"{', '.join(map(str, t.to_stages))}: {t.seconds * 1e3:.3g} ms"
            )
        for a in self.alternatives:
            out.append(f"{a.what}: {a.seconds * 1e3:.4g} ms ({a.ratio:.3f} × this plan)")
        return out


def explain(
    plan: Plan,
    captured: Graph,
    graph: Graph,
    topology: Topology,
    *,
    seconds: float = 5.0,
    seed: int = 0,
    **options: object,
) -> Explanation:
    """Explains `plan` on `topology`: `captured` is what was planned, `graph` the same with the costs planned for.

    The alternatives are planned anew in about `seconds` together; `options` are partition's.
    """
    slowest = max(plan.stages, key=lambda s: s.period_s)
    whole = slowest.compute_s + slowest.receive_s + slowest.send_s
    device = topology.device[slowest.devices[0]]
    largest = max((graph.node[n] for n in slowest.nodes), key=lambda n: node_seconds(n, device) or 0.0)
    fullest = max(plan.stages, key=lambda s: _fill(s, topology))
    return Explanation(
        stage=slowest.id,
        parts={
            name: value / whole if whole else 0.0
            for name, value in (
                ("compute", slowest.compute_s),
                ("receive", slowest.receive_s),
                ("send", slowest.send_s),
            )
        },
        fullest=(fullest.id, _fill(fullest, topology)),
        largest_node=(largest.name or str(largest.id), node_seconds(largest, device) or 0.0),
        tensors=_tensors(plan, graph, topology, slowest),
        alternatives=tuple(_alternatives(plan, captured, topology, seconds, seed, options)),
    )


def _fill(stage: Stage, topology: Topology) -> float:
    room = min(topology.device[d].memory_bytes for d in stage.devices)
    return stage.memory_bytes / room if room else 0.0


def _tensors(plan: Plan, graph: Graph, topology: Topology, slowest: Stage) -> tuple[Tensor, ...]:
    host = {s.id: topology.device[s.devices[0]].node for s in plan.stages}
    found = []
    for u, consumers in graph.successors.items():
        node, a = graph.node[u], plan.stage_of[u]
        to = sorted({plan.stage_of[v] for v in consumers} - {a})
        if to and node.output_bytes and slowest.id in (a, *to):
            wire = max(topology.link(host[a], host[b]).seconds(node.output_bytes) for b in to)
            found.append(
                Tensor(producer=node.name or str(u), seconds=wire, n_bytes=node.output_bytes, to_stages=tuple(to))
            )
    return tuple(sorted(found, key=lambda t: -t.seconds))


def _alternatives(
    plan: Plan, graph: Graph, topology: Topology, seconds: float, seed: int, options: dict[str, object]
) -> list[Alternative]:
    devices = topology.devices
    fastest = min(
        (d for d in devices if not d.free_transfer),
        key=lambda d: sum(node_seconds(n, d) or 0.0 for n in graph.nodes),
        default=devices[0],
    )
    more = replace(topology, devices=(*devices, replace(fastest, id=_new_id(devices))))
    quick = replace(
        topology, default=_twice(topology.default), pairs={ends: _twice(link) for ends, link in topology.pairs.items()}
    )
    cases: list[tuple[str, Topology, int | None]] = [
        (f"one more device like {fastest.id}", more, None),
        ("links twice as fast", quick, None),
    ]
    if len(plan.stages) > 1:
        cases.append(("the next-best cut, with a stage less", topology, len(plan.stages) - 1))
    out = []
    for what, other, stages in cases:
        try:
            found = partition(
                graph, other, plan.objective, plan.mode, stages=stages, seed=seed, overlap=plan.overlap,
                max_seconds=max(0.1, seconds / len(cases)), **options,  # type: ignore[arg-type]
            )  # fmt: skip
        except Infeasible:
            continue
        value = found.objective_s
        out.append(Alternative(what=what, seconds=value, ratio=value / plan.objective_s if plan.objective_s else 1.0))
    return out


def _twice(link: Link) -> Link:
    return Link(link.bytes_per_s * 2, link.latency_s)


def _new_id(devices: tuple[Device, ...]) -> str:
    taken = {d.id for d in devices}
    return next(f"extra{i}" for i in range(len(taken) + 1) if f"extra{i}" not in taken)
