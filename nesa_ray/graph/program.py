"""The exported program made flat: state as get_attr, no assertions, no gradient-mode regions, no dead code."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from nesa_ray.errors import CaptureError
from nesa_ray.graph import cost
from nesa_ray.graph.inplace import make_functional, writes, writes_state


@dataclass(frozen=True)
class Flat:
    """See Captured for `inputs` and `outputs`; `constants` are tensors that the model's code made while it ran."""

    program: fx.Graph
    inputs: tuple[str | None, ...]
    outputs: tuple[Any, ...]
    constants: Mapping[str, torch.Tensor]


def flatten(exported: Any, aliases: Mapping[str, str]) -> Flat:
    """Flattens what torch.export made; raises CaptureError for what can't be cut."""
    signature = exported.graph_signature
    program = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    inputs: list[str | None] = []
    constants: dict[str, torch.Tensor] = {}
    states: dict[str, fx.Node] = {}
    specs = {s.arg.name: s for s in signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    inputs.append(None)
                    copied[node] = spec.arg.value
                    continue
                copied[node] = program.node_copy(node)
                inputs.append(copied[node].name)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                target = aliases.get(spec.target, spec.target)
                if spec.kind == InputKind.CONSTANT_TENSOR:
                    constants[target] = exported.constants[spec.target]
                if target not in states:
                    states[target] = program.create_node("get_attr", target, name=node.name)
                    states[target].meta["val"] = node.meta["val"]
                copied[node] = states[target]
            else:
                raise CaptureError(f"input {node.name}: a {spec.kind.name.lower()} can't be captured")
        elif node.op == "call_function":
            _copy_call(program, node, copied, exported.graph_module)
    by_name = {n.name: n for n in exported.graph.nodes}
    outputs: list[Any] = []
    for out in signature.output_specs:
        if out.kind == OutputKind.USER_OUTPUT:
            constant = isinstance(out.arg, ConstantArgument)
            outputs.append((out.arg.value,) if constant else copied[by_name[out.arg.name]])
    results = program.output(tuple(o for o in outputs if not isinstance(o, tuple)))
    make_functional(program)
    _drop_identities(program)
    now = iter(a.name for a in results.args[0])
    names = tuple(o if isinstance(o, tuple) else next(now) for o in outputs)
    program.eliminate_dead_code(lambda n: writes_state(n) or n.op in ("placeholder", "output"))
    return Flat(program, tuple(inputs), names, constants)


_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}


def _copy_call(program: fx.Graph, node: fx.Node, copied: dict[fx.Node, Any], owner: torch.nn.Module) -> None:
    """Copies one call; a region that switches gradients or autocast is copied flat, its outputs detached if need be."""
    if node.target in _ASSERTIONS:
        return
    kind = getattr(node.target, "__name__", "")
    if kind in _REGIONS:
        inner_at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = getattr(owner, str(node.args[inner_at].target))
        given = iter(node.args[inner_at + 1 :])
        within: dict[fx.Node, Any] = {}
        stop_gradient = kind == _REGIONS[0] and node.args[0] is False
        for n in inner.graph.nodes:
            if n.op == "placeholder":
                a = next(given)
                within[n] = copied[a] if isinstance(a, fx.Node) else a
            elif n.op == "call_function":
                _copy_call(program, n, within, inner)
            elif n.op == "output":
                results = [within[a] for a in pytree.tree_leaves(n.args[0])]
                copied[node] = tuple(_detached(program, r) if stop_gradient else r for r in results)
        return
    if node.target is operator.getitem and isinstance(copied.get(node.args[0]), tuple):
        copied[node] = copied[node.args[0]][node.args[1]]
        return
    new = program.create_node(
        "call_function",
        node.target,
        fx.node.map_arg(node.args, lambda a: copied[a]),
        fx.node.map_arg(node.kwargs, lambda a: copied[a]),
        name=node.name,
    )
    new.meta = {k: node.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in node.meta}
    copied[node] = new


def _detached(program: fx.Graph, node: Any) -> Any:
    if not isinstance(node, fx.Node) or is_size(node) or node.op == "get_attr":
        return node
    new = program.call_function(torch.ops.aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new


def _drop_identities(program: fx.Graph) -> None:
    """Removes casts to the dtype that is already there and slices of everything."""
    for node in list(program.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None or node.op != "call_function" or writes(node):
            continue
        op, args = cost.packet(node), node.args
        everything = op is torch.ops.aten.slice and args[2:] in ((0, sys.maxsize), (None, None)) and not node.kwargs
        same_cast = op is torch.ops.aten.to and source.op != "get_attr" and cost.is_view(node)
        if everything or (same_cast and not _copies(node)):
            node.replace_all_uses_with(source)
            program.erase_node(node)


def _copies(node: fx.Node) -> bool:
    """Whether a cast was asked to copy (`to(..., copy=True)`)."""
    return any(a is True for a in node.args) or bool(node.kwargs.get("copy"))


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a number (a size), not a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def packet_name(node: fx.Node) -> str:
    """The operator's bare name, like "add"."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
