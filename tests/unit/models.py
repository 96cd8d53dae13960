"""Small models and plans that the tests share."""

import itertools
import random
from collections.abc import Sequence

import torch

from nesa_ray.graph.capture import Captured
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.plan import Plan, Stage, stage_graph, topological_stages


def manual_plan(graph: Graph, parts: Sequence[Sequence[int]]) -> Plan:
    """A plan with the given nodes per stage, on devices d0, d1, …"""
    stages = tuple(Stage(id=i, devices=(f"d{i}",), nodes=tuple(p)) for i, p in enumerate(parts))
    return Plan(objective="throughput", stages=stages, bottleneck_s=0.0, latency_s=0.0, lower_bound_s=0.0)


def plan_on(*stages: tuple[str, ...]) -> Plan:
    """A plan that puts node i on the i-th group of devices; its times are all one second."""
    return Plan(
        objective="throughput",
        stages=tuple(Stage(id=i, devices=devices, nodes=(i,)) for i, devices in enumerate(stages)),
        bottleneck_s=1.0,
        latency_s=1.0,
        lower_bound_s=1.0,
    )


def even_plan(captured: Captured, k: int) -> Plan:
    """The captured order cut into k runs of about as many nodes, colocated nodes kept together."""
    order = list(captured.graph.order)
    cuts = [round(i * len(order) / k) for i in range(k + 1)]
    parts = [list(order[a:b]) for a, b in itertools.pairwise(cuts)]
    return manual_plan(captured.graph, _colocated(captured.graph, parts))


def random_plan(captured: Captured, k: int, seed: int) -> Plan:
    """A random acyclic partition: nodes move between stages as long as the stage graph stays acyclic."""
    rng = random.Random(seed)
    plan = even_plan(captured, k)
    stage_of = dict(plan.stage_of)
    for _ in range(200):
        n = rng.choice(captured.graph.nodes)
        if n.colocate is not None:
            continue
        before, stage_of[n.id] = stage_of[n.id], rng.randrange(k)
        if topological_stages(stage_graph(captured.graph, stage_of)) is None or before not in stage_of.values():
            stage_of[n.id] = before
    return manual_plan(captured.graph, [[n for n, s in stage_of.items() if s == i] for i in range(k)])


def _colocated(graph: Graph, parts: list[list[int]]) -> list[list[int]]:
    home: dict[object, int] = {}
    for i, part in enumerate(parts):
        for n in part:
            c = graph.node[n].colocate
            if c is not None:
                home.setdefault(c, i)
    out: list[list[int]] = [[] for _ in parts]
    for i, part in enumerate(parts):
        for n in part:
            out[home.get(graph.node[n].colocate, i)].append(n)
    return out


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a - b).detach().norm() / b.norm().clamp_min(1e-12))


class UNet(torch.nn.Module):
    """Skips over several stages, transposed convolutions, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Conv2d(8, 16, 3, 2, 1)
        self.middle = torch.nn.Conv2d(16, 16, 3, 1, 1)
        self.up2, self.up1 = torch.nn.ConvTranspose2d(16, 8, 2, 2), torch.nn.ConvTranspose2d(16, 8, 2, 2)
        self.out = torch.nn.Conv2d(11, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.down1(x))
        b = torch.relu_(self.down2(a))
        u = torch.cat([self.up2(self.middle(b)), a], 1)
        return self.out(torch.cat([self.up1(u), x], 1))


class TwoTower(torch.nn.Module):
    """Two branches without edges between them, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
        self.right = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> dict[str, torch.Tensor]:
        u, i = self.left(user), self.right(item)
        return {"score": (u * i).sum(-1), "user": u}
