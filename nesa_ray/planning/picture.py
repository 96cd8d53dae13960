"""A plan as one self-contained HTML page: the stage DAG, and what each stage spends its time on."""

from __future__ import annotations

from html import escape

from nesa_ray.cluster.topology import Topology
from nesa_ray.graph.graph import Graph
from nesa_ray.planning.plan import Plan, stage_graph, topological_stages

BOX_W, BOX_H, GAP_X, GAP_Y = 190, 74, 70, 26
BAR_W, BAR_H = 640, 22
COLOURS = {"receive": "#7aa6c2", "compute": "#3c6e4f", "send": "#d08c4a"}
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
h1 { font-size: 1.3em; } h2 { font-size: 1.05em; margin-top: 2em; } table { border-collapse: collapse; }
th, td { text-align: right; padding: .25em .8em; border-bottom: 1px solid #ddd; } th:nth-child(2), td:nth-child(2)
{ text-align: left; } svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; }
"""


def html(plan: Plan, graph: Graph, topology: Topology) -> str:
    """The page.  `graph` has the costs that the plan was made with."""
    name = escape(graph.name or "graph")
    proof = "proved optimal" if plan.proved_optimal else f"at most {plan.gap:.2%} above the best possible"
    facts = (
        f"{len(graph.nodes)} nodes in {len(plan.stages)} stages on {len(plan.devices)} of {len(topology.devices)} "
        f"devices. Bottleneck {_ms(plan.bottleneck_s)}, latency {_ms(plan.latency_s)}; lower bound "
        f"{_ms(plan.lower_bound_s)} ({escape(plan.bound_by)}): {proof}. Planned in {plan.planning_s:.2f} s."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plan of {name}</title>'
        f"<style>{STYLE}</style></head><body><h1>Plan of {name} for {escape(plan.objective)}, {escape(plan.mode)}</h1>"
        f"<p>{facts}</p><h2>Stages and what flows between them</h2>{_dag(plan, graph, topology)}"
        f"<h2>Where the time goes, per micro-batch</h2>{_bars(plan)}<h2>Stages</h2>{_table(plan, graph, topology)}"
        "</body></html>\n"
    )


def _dag(plan: Plan, graph: Graph, topology: Topology) -> str:
    """Stages in columns by their longest path from the inputs; arrows as thick as their bytes."""
    quotient = stage_graph(graph, plan.stage_of)
    order = topological_stages(quotient) or [s.id for s in plan.stages]
    column = dict.fromkeys(order, 0)
    for a in order:
        for b in quotient.get(a, ()):
            column[b] = max(column[b], column[a] + 1)
    row: dict[int, int] = {}
    filled: dict[int, int] = {}
    for a in order:
        row[a] = filled.get(column[a], 0)
        filled[column[a]] = row[a] + 1
    place = {a: (20 + column[a] * (BOX_W + GAP_X), 40 + row[a] * (BOX_H + GAP_Y)) for a in order}
    width = 40 + (max(column.values()) + 1) * (BOX_W + GAP_X)
    height = 80 + max(filled.values()) * (BOX_H + GAP_Y)
    flows: dict[tuple[int, int], float] = {}
    for u, consumers in graph.successors.items():
        a = plan.stage_of[u]
        for b in {plan.stage_of[v] for v in consumers} - {a}:
            flows[a, b] = flows.get((a, b), 0.0) + graph.node[u].output_bytes
    most = max(flows.values(), default=0.0) or 1.0
    parts = []
    for (a, b), n_bytes in sorted(flows.items()):
        (xa, ya), (xb, yb) = place[a], place[b]
        forward = column[b] > column[a]
        x1, x2 = (xa + BOX_W, xb) if forward else (xa + BOX_W / 2, xb + BOX_W / 2)
        y1, y2 = (ya + BOX_H / 2, yb + BOX_H / 2) if forward else (ya + BOX_H, yb + BOX_H)
        bend = 30 * (column[b] - column[a] - 1) if forward else 40
        middle = (y1 + y2) / 2 - bend if forward else max(y1, y2) + bend
        parts.append(
            f'<path d="M{x1:.0f},{y1:.0f} Q{(x1 + x2) / 2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}" fill="none" '
            f'stroke="#888" stroke-width="{1 + 4 * n_bytes / most:.1f}" marker-end="url(#tip)">'
            f"<title>stage {a} to stage {b}: {n_bytes / 1e6:.3g} MB</title></path>"
        )
    slowest = max(plan.stages, key=lambda s: s.period_s)
    for s in plan.stages:
        x, y = place[s.id]
        room = min(topology.device[d].memory_bytes for d in s.devices)
        edge = "#b3312c" if s is slowest else "#555"
        devices = ", ".join(s.devices)
        devices = devices if len(devices) <= 26 else devices[:24] + "…"
        parts.append(
            f'<g><rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="6" fill="#fafaf7" stroke="{edge}" '
            f'stroke-width="2"/><text x="{x + 10}" y="{y + 20}" font-weight="600">'
            f"stage {s.id}: {escape(devices)}</text>"
            f'<text x="{x + 10}" y="{y + 40}">{len(s.nodes)} nodes, {_ms(s.cost_s)}</text>'
            f'<text x="{x + 10}" y="{y + 60}">{s.memory_bytes / 1e9:.3g} GB'
            f"{f' of {room / 1e9:.3g} GB' if room < float('inf') else ''}</text></g>"
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="stage graph"><defs><marker id="tip" '
        'viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="10" markerHeight="10" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>{"".join(parts)}</svg>'
    )


def _bars(plan: Plan) -> str:
    longest = max((s.receive_s + s.compute_s + s.send_s for s in plan.stages), default=0.0) or 1.0
    parts = []
    for i, s in enumerate(plan.stages):
        x, y = 80.0, 30 + i * (BAR_H + 8)
        parts.append(f'<text x="0" y="{y + 15}">stage {s.id}</text>')
        for name, value in (("receive", s.receive_s), ("compute", s.compute_s), ("send", s.send_s)):
            width = BAR_W * value / longest
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR_H}" fill="{COLOURS[name]}">'
                f"<title>{name} {_ms(value)}</title></rect>"
            )
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{_ms(s.cost_s)}</text>')
    for i, (name, colour) in enumerate(COLOURS.items()):
        parts.append(
            f'<rect x="{80 + i * 110}" y="2" width="14" height="14" fill="{colour}"/>'
            f'<text x="{100 + i * 110}" y="14">{name}</text>'
        )
    height = 40 + len(plan.stages) * (BAR_H + 8)
    return (
        f'<svg viewBox="0 0 {BAR_W + 180} {height}" role="img" aria-label="time of each stage">{"".join(parts)}</svg>'
    )


def _table(plan: Plan, graph: Graph, topology: Topology) -> str:
    head = "".join(
        f"<th>{h}</th>" for h in ("stage", "devices", "nodes", "parameters, GB", "memory, GB", "of", "receive",
                                  "compute", "send", "per micro-batch")
    )  # fmt: skip
    rows = []
    for s in plan.stages:
        room = min(topology.device[d].memory_bytes for d in s.devices)
        cells = (
            s.id, escape(", ".join(s.devices)), len(s.nodes),
            f"{sum(graph.node[n].param_bytes for n in s.nodes) / 1e9:.3g}", f"{s.memory_bytes / 1e9:.3g}",
            f"{room / 1e9:.3g}", _ms(s.receive_s), _ms(s.compute_s), _ms(s.send_s), _ms(s.period_s),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
