"""nn.Module -> Captured: its operators as one graph, made by torch.export, on the meta device if the module is there.

A captured program has three kinds of fx nodes besides inputs and outputs:
  placed   an operator that the plan puts in exactly one stage; these are the nodes of the Graph
  free     a cheap function of the user's inputs alone (positions, rotary angles, sizes): every stage that needs its
           value computes it again, so it never crosses a link
  state    a parameter or buffer (get_attr), by its name in the module
"""

from __future__ import annotations

import operator
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from nesa_ray.errors import CaptureError
from nesa_ray.graph import cost
from nesa_ray.graph.graph import Graph, Node

FREE_SHARE = 1e-2  # a free node's share of the program's bytes moved, at most


@dataclass(frozen=True)
class Captured:
    """A module's computation: `graph` for the planner, `program` for the splitter, `state` by the module's names.

    inputs     name of each flattened user input; None where a constant was captured
    outputs    fx node name of each flattened output, or the constant itself wrapped in a 1-tuple
    state      parameters and buffers by name; on the meta device where the module had none
    trainable  names of the parameters that require a gradient
    aliases    other names of the same parameter (tied weights) -> the name that `state` has
    node_id    fx node name -> Graph node id, for placed nodes
    """

    graph: Graph
    program: fx.Graph = field(repr=False)
    inputs: tuple[str | None, ...]
    in_spec: Any = field(repr=False)
    outputs: tuple[Any, ...]
    out_spec: Any = field(repr=False)
    state: Mapping[str, torch.Tensor] = field(repr=False)
    trainable: frozenset[str] = field(repr=False)
    aliases: Mapping[str, str] = field(repr=False)
    node_id: Mapping[str, int] = field(repr=False)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a call by input name; raises CaptureError when the call has another form than the captured."""
        flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if spec != self.in_spec:
            reordered = {k: kwargs[k] for k in self.in_spec.child(1).context if k in kwargs}
            flat, spec = pytree.tree_flatten((tuple(args), reordered))
        if spec != self.in_spec or len(flat) != len(self.inputs):
            raise CaptureError(f"call: was captured with the inputs {self.in_spec}, got {spec}")
        return {name: value for name, value in zip(self.inputs, flat, strict=True) if name is not None}

    def unflatten(self, values: Mapping[str, torch.Tensor]) -> Any:
        """The module's output from the values of its output nodes."""
        flat = [o[0] if isinstance(o, tuple) else values[o] for o in self.outputs]
        return pytree.tree_unflatten(flat, self.out_spec)


def capture(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    name: str = "",
) -> Captured:
    """Captures one forward pass; costs are at the shapes of `args` (one micro-batch), which may be on the meta device.

    `dynamic_shapes` is torch.export's: dimensions that may differ at run time.  The module isn't changed.
    Raises CaptureError, naming the line of the model's code, where the computation can't be one graph.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as e:
        raise CaptureError(_refusal(module, e)) from e
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    every = dict(module.named_parameters(remove_duplicate=False))
    canonical = {id(p): n for n, p in module.named_parameters()}
    aliases = {n: canonical[id(p)] for n, p in every.items() if canonical[id(p)] != n}
    program, inputs, outputs, constants = _normalise(exported, aliases)
    state |= constants
    used = {str(n.target) for n in program.nodes if n.op == "get_attr"}
    free = _free_nodes(program)
    graph, node_id = _graph(program, free, state, name or type(module).__name__)
    return Captured(
        graph=graph,
        program=program,
        inputs=inputs,
        in_spec=exported.call_spec.in_spec,
        outputs=outputs,
        out_spec=exported.call_spec.out_spec,
        state={n: t.detach() for n, t in state.items() if n in used},
        trainable=frozenset(n for n, p in module.named_parameters() if p.requires_grad and n in used),
        aliases=aliases,
        node_id=node_id,
    )


def _refusal(module: torch.nn.Module, error: Exception) -> str:
    """One line: what torch.export said, and the innermost line of code outside of torch that it was at."""
    said = str(error).strip().splitlines()
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/torch/" not in frame.filename and "nesa_ray" not in frame.filename:
            place = f" at {frame.filename}:{frame.lineno}: {frame.line}"
            break
    return (
        f"{type(module).__name__}: can't be captured as one graph{place}: {said[0] if said else type(error).__name__}"
    )


def _normalise(
    exported: Any, aliases: Mapping[str, str]
) -> tuple[fx.Graph, tuple[Any, ...], tuple[Any, ...], dict[str, torch.Tensor]]:
    """The exported graph with state as get_attr, without metadata assertions, grad-mode regions and dead code."""
    signature = exported.graph_signature
    program = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    inputs: list[str | None] = []
    constants: dict[str, torch.Tensor] = {}
    specs = {s.arg.name: s for s in signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    inputs.append(None)
                    copied[node] = spec.arg.value
                    continue
                inputs.append(node.name)
                copied[node] = program.node_copy(node)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                target = aliases.get(spec.target, spec.target)
                if spec.kind == InputKind.CONSTANT_TENSOR:
                    constants[target] = exported.constants[spec.target]
                copied[node] = _state_node(program, target, node)
            else:
                raise CaptureError(f"input {node.name}: a {spec.kind.name.lower()} can't be captured")
        elif node.op == "call_function":
            _copy_call(program, node, copied, exported.graph_module)
    outputs: list[Any] = []
    for out in signature.output_specs:
        if out.kind != OutputKind.USER_OUTPUT:
            continue
        if isinstance(out.arg, ConstantArgument):
            outputs.append((out.arg.value,))
        else:
            source = next(n for n in exported.graph.nodes if n.name == out.arg.name)
            outputs.append(copied[source].name)
    by_name = {n.name: n for n in program.nodes}
    program.output(tuple(by_name[o] for o in outputs if isinstance(o, str)))
    _make_functional(program)
    _drop_identities(program)
    outputs_now = iter(a.name for a in next(iter(reversed(program.nodes))).args[0])
    outputs = [o if isinstance(o, tuple) else next(outputs_now) for o in outputs]
    program.eliminate_dead_code(lambda n: _writes_state(n) or n.op in ("placeholder", "output"))
    return program, tuple(inputs), tuple(outputs), constants


def _state_node(program: fx.Graph, target: str, like: fx.Node) -> fx.Node:
    for n in program.nodes:
        if n.op == "get_attr" and n.target == target:
            return n
    node = program.create_node("get_attr", target, name=like.name)
    node.meta["val"] = like.meta["val"]
    return node


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


def _detached(program: fx.Graph, node: fx.Node) -> fx.Node:
    new = program.call_function(torch.ops.aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new


def _writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that the operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    written = [a for a, s in zip(node.args, schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write]
    return [a for a in written if isinstance(a, fx.Node)]


def _writes_state(node: fx.Node) -> bool:
    if packet_name(node) == "batch_norm":
        return True
    return any(a.op == "get_attr" for a in _writes(node))


def packet_name(node: fx.Node) -> str:
    """The operator's bare name, like "add"."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _make_functional(program: fx.Graph) -> None:
    """Replaces in-place operators on activations by functional ones; writes to state (running means) stay."""
    for node in list(program.nodes):
        targets = [a for a in _writes(node) if a.op != "get_attr"]
        if not targets:
            continue
        name = packet_name(node)
        functional = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
        overload = getattr(functional, node.target._overloadname, None) if functional else None
        written = targets[0]
        if overload is None or cost.is_view(written):
            line = _line(node)
            raise CaptureError(f"{name}: writes into a tensor in place, which can't be cut{line}")
        node.target = overload
        later = False
        for other in program.nodes:
            if later and written in other.all_input_nodes:
                other.replace_input_with(written, node)
            later = later or other is node


def _drop_identities(program: fx.Graph) -> None:
    """Removes casts to the dtype that is already there and slices of everything."""
    for node in list(program.nodes):
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None or node.op != "call_function":
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


def _line(node: fx.Node) -> str:
    trace = [row.strip() for row in str(node.meta.get("stack_trace", "")).splitlines() if row.strip()]
    return f" ({trace[-2]}: {trace[-1]})" if len(trace) >= 2 else ""


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a number (a size), not a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def _free_nodes(program: fx.Graph) -> set[fx.Node]:
    """Sizes, and cheap deterministic functions of the user's inputs and of buffers."""
    calls = [n for n in program.nodes if n.op == "call_function"]
    total = sum(cost.op_cost(n).access_bytes for n in calls if not is_size(n)) or 1.0
    free: set[fx.Node] = set()
    for n in program.nodes:
        if is_size(n):
            free.add(n)
        elif n.op == "get_attr":
            if not n.meta["val"].requires_grad and not isinstance(n.meta["val"], torch.nn.Parameter):
                free.add(n)
        elif n.op == "placeholder":
            free.add(n)
        elif n.op == "call_function" and all(s in free for s in n.all_input_nodes):
            deterministic = cost.packet(n) not in cost.RANDOM and not _writes(n)
            if deterministic and cost.op_cost(n).access_bytes <= FREE_SHARE * total:
                free.add(n)
    if all(n in free for n in calls):
        return {n for n in free if n.op != "call_function" or is_size(n)}
    return free


def _graph(
    program: fx.Graph, free: set[fx.Node], state: Mapping[str, torch.Tensor], name: str
) -> tuple[Graph, dict[str, int]]:
    placed = [n for n in program.nodes if n.op == "call_function" and n not in free]
    node_id = {n.name: i for i, n in enumerate(placed)}
    costs = {n: cost.op_cost(n) for n in placed}
    saved = {s for c in costs.values() for s in c.saves}
    owned: set[fx.Node] = set()
    nodes = []
    tuples = {n for n in placed if not isinstance(n.meta.get("val"), torch.Tensor)}
    together: dict[fx.Node, int] = {}
    for n in placed:
        source = n.args[0] if n.args and isinstance(n.args[0], fx.Node) else None
        if n.target is operator.getitem and source is not None and source in tuples:
            together[n] = together[source] = node_id[source.name]
    for n in placed:
        c = costs[n]
        params = {s for s in n.all_input_nodes if s.op == "get_attr"} - owned
        owned |= params
        nodes.append(
            Node(
                id=node_id[n.name],
                name=n.name,
                op=str(n.target) if not isinstance(n.target, str) else n.target,
                flops=c.flops,
                param_bytes=float(
                    sum(state[str(p.target)].numel() * state[str(p.target)].element_size() for p in params)
                ),
                output_bytes=0.0 if n in tuples else float(c.output_bytes),
                saved_bytes=float(c.output_bytes) if n in saved else 0.0,
                access_bytes=c.access_bytes,
                colocate=together.get(n),
            )
        )
    edges = [(node_id[s.name], node_id[n.name]) for n in placed for s in n.all_input_nodes if s.name in node_id]
    return Graph(tuple(nodes), tuple(edges), name), node_id
