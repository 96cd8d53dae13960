"""Which operators of a flat program the plan places, which each stage computes for itself; the Graph of the placed.

Placed operators that write the same buffer, or read a written one, share a stage.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx

from nesa_ray.errors import CaptureError
from nesa_ray.graph import cost
from nesa_ray.graph.graph import Graph, Node
from nesa_ray.graph.inplace import base, line, writes
from nesa_ray.graph.modes import RANDOM
from nesa_ray.graph.program import is_size
from nesa_ray.graph.saved import differentiable, saved

FREE_SHARE = 1e-2  # a free node's share of the program's bytes moved, at most
aten = torch.ops.aten
_NUMBERS_OF_VALUES = {aten.item, aten._local_scalar_dense}


def place(
    program: fx.Graph, state: Mapping[str, torch.Tensor], trainable: Collection[str], name: str
) -> tuple[Graph, dict[str, int]]:
    """(graph of the placed operators, its node id by fx node name).

    Raises CaptureError, naming the line, where a computed value decides what is computed.
    """
    _copy_reads(program)
    costs = {n: cost.op_cost(n) for n in program.nodes if n.op == "call_function"}
    free = _free_nodes(program, costs, state)
    placed = [n for n in costs if n not in free]
    node_id = {n.name: i for i, n in enumerate(placed)}
    for n in free:
        for s in n.all_input_nodes:
            if s.name in node_id and cost.packet(n) in _NUMBERS_OF_VALUES:
                raise CaptureError(f"{s.name}: its value is read as a number, which can't be cut{line(n)}")
    kept = _saved_bytes(placed, differentiable(program, trainable))
    together = _together(placed, node_id)
    tuples = {n for n in placed if not isinstance(n.meta.get("val"), torch.Tensor)}
    owned: set[str] = set()
    nodes = []
    for n in placed:
        c = costs[n]
        params = {str(s.target) for s in n.all_input_nodes if s.op == "get_attr"} - owned
        owned |= params
        nodes.append(
            Node(
                id=node_id[n.name],
                name=n.name,
                op=str(n.target),
                flops=c.flops,
                param_bytes=float(sum(state[p].nbytes for p in params)),
                frozen_bytes=float(sum(state[p].nbytes for p in params if p not in trainable)),
                output_bytes=0.0 if n in tuples else float(c.output_bytes),
                saved_bytes=float(kept.get(n, 0)),
                access_bytes=c.access_bytes,
                cache_bytes=_cache_bytes(n),
                colocate=together.get(n),
            )
        )
    edges = [(node_id[s.name], node_id[n.name]) for n in placed for s in n.all_input_nodes if s.name in node_id]
    return Graph(tuple(nodes), tuple(edges), name), node_id


def _cache_bytes(node: fx.Node) -> float:
    """Bytes of the keys and values of one token that an attention node keeps when serving."""
    if node.target is not torch.ops.nesa.attention.default:
        return 0.0
    keys, values = (a.meta["val"] for a in node.args[1:3])
    return float(cost.n_bytes(keys) + cost.n_bytes(values)) / (cost.shape(keys)[0] * cost.shape(keys)[2])


def _saved_bytes(placed: Iterable[fx.Node], flows: set[fx.Node]) -> dict[fx.Node, int]:
    """What a training step keeps of each node; views are charged, once, to the node that made the memory."""
    bytes_of: dict[fx.Node, int] = {}
    kept: set[fx.Node] = set()
    for n in placed:
        values, besides = saved(n, flows)
        kept |= {base(v) for v in values}
        bytes_of[n] = besides
    for n in kept & bytes_of.keys():
        bytes_of[n] += cost.n_bytes(n.meta["val"])
    return bytes_of


def _copy_reads(program: fx.Graph) -> None:
    """A buffer that is written is read through a copy, so that the next micro-batch's write can't change what this
    one keeps for its backward."""
    written = {base(a) for n in program.nodes for a in writes(n)}
    for node in list(program.nodes):
        if writes(node) or node.op == "output" or base(node) in written:
            continue
        for source in node.all_input_nodes:
            if base(source) in written:
                with program.inserting_before(node):
                    copy = program.call_function(aten.clone.default, (source,))
                copy.meta = {**node.meta, "val": source.meta["val"]}
                node.replace_input_with(source, copy)


def _free_nodes(
    program: fx.Graph, costs: Mapping[fx.Node, cost.OpCost], state: Mapping[str, torch.Tensor]
) -> set[fx.Node]:
    """Sizes, and cheap deterministic functions of the user's inputs and of buffers."""
    total = sum(c.access_bytes for n, c in costs.items() if not is_size(n)) or 1.0
    written = {base(a) for n in costs for a in writes(n)}
    free: set[fx.Node] = set()
    for n in program.nodes:
        if is_size(n) or n.op == "placeholder":
            free.add(n)
        elif n.op == "get_attr":
            if n not in written and not isinstance(state[str(n.target)], torch.nn.Parameter):
                free.add(n)
        elif n.op == "call_function" and all(s in free for s in n.all_input_nodes):
            deterministic = cost.packet(n) not in RANDOM and not writes(n) and "opaque" not in n.meta
            if deterministic and costs[n].access_bytes <= FREE_SHARE * total:
                free.add(n)
    if all(n in free for n in costs):
        return {n for n in free if n.op != "call_function" or is_size(n)}
    return free


def _together(placed: Iterable[fx.Node], node_id: Mapping[str, int]) -> dict[fx.Node, int]:
    """Nodes that share a stage -> the id of the first: a tuple and its items, all that touch a written buffer."""
    parent: dict[object, object] = {}

    def find(x: object) -> object:
        while parent.setdefault(x, x) is not x:
            parent[x] = x = parent[parent[x]]
        return x

    placed = list(placed)
    written = {base(a) for n in placed for a in writes(n)}
    for n in placed:
        source = n.args[0] if n.args and isinstance(n.args[0], fx.Node) else None
        if n.target is operator.getitem and source is not None and source.name in node_id:
            parent[find(n)] = find(source)
        for a in (n, *n.all_input_nodes):
            if base(a) in written:
                owner = str(base(a).target).rpartition(".")[0]  # a module's statistics and their counter go together
                parent[find(n)] = find(owner)
    first: dict[object, int] = {}
    return {n: first.setdefault(find(n), node_id[n.name]) for n in placed if n in parent}
