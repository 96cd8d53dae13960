"""Small random graphs and clusters, and the best plan among all acyclic partitions."""

import itertools
import random

from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import InvalidPlan
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.plan import Stage, check_assignment, cost_stages, latency_seconds


def random_graph(rng: random.Random, n: int, *, kinds: tuple[str, ...] = ("gpu",), backward: bool = False) -> Graph:
    """Up to n nodes: branches, hyperedges, zero-cost nodes, colocation, and a backward pass on request."""
    nodes, edges = [], []
    for i in range(n):
        free = rng.random() < 0.25
        compute = {k: 0.0 if free else rng.randint(1, 20) / 4 for k in kinds if rng.random() < 0.9 or k == kinds[0]}
        nodes.append(
            {
                "id": i if rng.random() < 0.5 else f"n{i}",
                "compute_s": compute,
                "output_bytes": rng.choice([0, 1, 2, 5, 10]),
                "memory_bytes": 0 if free else rng.randint(0, 6),
                "colocate": rng.choice(["a", "b"]) if rng.random() < 0.15 else None,
            }
        )
    for i, j in itertools.combinations(range(n), 2):
        if rng.random() < 1.8 / n:
            edges.append([nodes[i]["id"], nodes[j]["id"]])
    if backward:
        for node in list(nodes):
            if len(nodes) < n + 4 and rng.random() < 0.6:
                node["colocate"] = node["colocate"] or f"pair{node['id']}"
                colocate = node["colocate"] if rng.random() < 0.85 else None
                nodes.append({**node, "id": f"b{node['id']}", "backward": True, "colocate": colocate})
        known = {m["id"] for m in nodes}
        edges += [[f"b{v}", f"b{u}"] for u, v in list(edges) if f"b{u}" in known and f"b{v}" in known]
        edges += [[u["id"], f"b{u['id']}"] for u in nodes if f"b{u['id']}" in known and rng.random() < 0.5]
    return Graph.from_dict({"nodes": nodes, "edges": edges})


def random_topology(
    rng: random.Random, m: int, *, unequal_links: bool, tight: float, kinds: tuple[str, ...]
) -> Topology:
    """m unequal devices on up to two hosts; `tight` is the memory of a device."""
    hosts = ["x", "y"][: 1 + unequal_links]
    devices = [
        {
            "id": f"d{i}",
            "kind": rng.choice(kinds),
            "node": rng.choice(hosts),
            "memory_bytes": rng.choice([tight, 2 * tight, 1e9]),
            "free_transfer": rng.random() < 0.15,
        }
        for i in range(m)
    ]
    present = {d["node"] for d in devices}
    links = {"default": {"bytes_per_s": rng.choice([2, 10, 1e9]), "latency_s": rng.choice([0, 0.25])}}
    if present == {"x", "y"}:
        links["pairs"] = [{"a": "x", "b": "y", "bytes_per_s": rng.choice([1, 4]), "latency_s": rng.choice([0, 1.5])}]
    return Topology.from_dict({"devices": devices, "links": links})


def brute_force(graph: Graph, topology: Topology, *, overlap: bool = False, stages: int | None = None):
    """(least bottleneck, least latency) over all acyclic partitions, by listing every assignment; None without any."""
    groups: dict = {}
    for i, node in enumerate(graph.nodes):
        groups.setdefault(("alone", i) if node.colocate is None else node.colocate, []).append(node.id)
    parts = list(groups.values())
    best_bottleneck, best_latency = None, None
    for choice in itertools.product(range(len(topology.devices)), repeat=len(parts)):
        used = sorted(set(choice))
        if stages is not None and len(used) != stages:
            continue
        plan = tuple(
            Stage(
                id=d,
                devices=(topology.devices[d].id,),
                nodes=tuple(i for part, c in zip(parts, choice, strict=True) if c == d for i in part),
            )
            for d in used
        )
        try:
            check_assignment(graph, topology, plan)
        except InvalidPlan:
            continue
        costed = cost_stages(graph, topology, plan, overlap=overlap)
        bottleneck = max(s.cost_s for s in costed)
        latency = latency_seconds(graph, topology, costed)
        best_bottleneck = bottleneck if best_bottleneck is None else min(best_bottleneck, bottleneck)
        best_latency = latency if best_latency is None else min(best_latency, latency)
    return None if best_bottleneck is None else (best_bottleneck, best_latency)
