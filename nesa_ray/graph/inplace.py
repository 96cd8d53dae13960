"""Writes in place, made functional, so that a value that crosses stages is never changed behind a reader's back.

A write through views (`x[:, 0] += 1`) becomes a new base (select_scatter …), from which the views are taken again.
Writes to parameters and buffers (running statistics, counters) stay: they are what the model means by them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from nesa_ray.errors import CaptureError
from nesa_ray.graph.cost import is_view, packet

aten = torch.ops.aten

_LISTS = {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unbind}
_RESHAPES = {
    aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten,
    aten.view_as, aten.reshape_as,
}  # fmt: skip
_BATCH_NORMS = {aten.batch_norm, aten.instance_norm}


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that the operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    if packet(node) in _BATCH_NORMS:
        return [a for a in node.args[3:5] if isinstance(a, fx.Node) and node.args[5]]
    if not schema.is_mutable:
        return []
    given = dict(zip((s.name for s in schema.arguments), node.args, strict=False)) | node.kwargs
    written = [given.get(s.name) for s in schema.arguments if s.alias_info and s.alias_info.is_write]
    return [a for a in written if isinstance(a, fx.Node)]


def base(node: fx.Node) -> fx.Node:
    """The node whose memory `node` shows: itself, unless it is a view."""
    while _shows(node):
        node = source_of(node)
    return node


def source_of(view: fx.Node) -> fx.Node:
    """The tensor that a view is taken from (for an item of a list of views: the tensor that was split)."""
    source = view.args[0]
    assert isinstance(source, fx.Node)
    return source_of(source) if view.target is operator.getitem else source


def writes_state(node: fx.Node) -> bool:
    """Whether the operator changes a parameter or buffer."""
    return any(base(a).op == "get_attr" for a in writes(node))


def make_functional(program: fx.Graph) -> None:
    """Replaces writes to activations and inputs; raises CaptureError, naming the line, where there is no such form."""
    for node in list(program.nodes):
        targets = [a for a in writes(node) if base(a).op != "get_attr"]
        if targets:
            _replace(program, node, targets[0])


def _shows(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem:
        return packet(node.args[0]) in _LISTS
    return is_view(node) or (bool(writes(node)) and packet(node) not in _BATCH_NORMS)


def _replace(program: fx.Graph, write: fx.Node, target: fx.Node) -> None:
    root = base(target)
    with program.inserting_before(write):
        new = _functional(program, write, target)
        at = target
        while at is not root:
            new = _write_back(program, write, at, new)
            at = source_of(at)
        now = {root: new}
        _views_again(program, root, write, now)
    for old, fresh in now.items():
        for user in list(old.users):
            if write < user and user is not fresh:
                user.replace_input_with(old, fresh)
    write.replace_all_uses_with(now[target])
    program.erase_node(write)


def _views_again(program: fx.Graph, at: fx.Node, write: fx.Node, now: dict[fx.Node, fx.Node]) -> None:
    """Takes again, from their new base, the views that exist before the write; unused ones die as dead code."""
    for view in list(at.users):
        if view < write and view.args[:1] == (at,) and view not in now and (_shows(view) or packet(view) in _LISTS):
            if view in now.values():
                continue
            now[view] = program.node_copy(view, lambda n: now.get(n, n))
            _views_again(program, view, write, now)


def _functional(program: fx.Graph, write: fx.Node, target: fx.Node) -> fx.Node:
    name = getattr(packet(write), "__name__", "")
    overload = getattr(write.target, "_overloadname", "default")
    value, args = target.meta["val"], write.args[1:]
    if name == "copy_":
        source = args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype != value.dtype:
            source = _call(program, write, aten.to.dtype, (source, value.dtype))
        return _call(program, write, aten.expand_as.default, (source, target))
    if name == "zero_":
        return _call(program, write, aten.zeros_like.default, (target,))
    if name == "bernoulli_" and overload == "float":
        return _call(program, write, aten.bernoulli.p, (target, *args), write.kwargs)
    if name == "normal_":
        return _call(program, write, aten.normal_functional.default, (target, *args), write.kwargs)
    functional = getattr(getattr(aten, name.rstrip("_"), None), overload, None) if name.endswith("_") else None
    if functional is None:
        raise CaptureError(f"{name}: writes into a tensor in place, which can't be cut{line(write)}")
    return _call(program, write, functional, (target, *args), write.kwargs)


def _write_back(program: fx.Graph, write: fx.Node, view: fx.Node, new: fx.Node) -> fx.Node:
    """The value of the view's source once the view holds `new`."""
    op, args, kwargs, source = packet(view), view.args, view.kwargs, source_of(view)
    if view.target is operator.getitem:
        items = args[0]
        assert isinstance(items, fx.Node)
        parts = [
            new if i == args[1] else _call(program, write, operator.getitem, (items, i), value=value)
            for i, value in enumerate(items.meta["val"])
        ]
        join = aten.stack.default if packet(items) is aten.unbind else aten.cat.default
        return _call(program, write, join, (parts, _argument(items, "dim", 0)), value=source.meta["val"])
    if op is aten.slice:
        return _call(program, write, aten.slice_scatter.default, (source, new, *args[1:]), kwargs)
    if op is aten.select:
        return _call(program, write, aten.select_scatter.default, (source, new, *args[1:]), kwargs)
    if op is aten.narrow:
        _, dimension, start, length = args
        return _call(program, write, aten.slice_scatter.default, (source, new, dimension, start, start + length))
    if op in (aten.transpose, aten.t):
        return _call(program, write, view.target, (new, *args[1:]), kwargs)
    if op is aten.permute:
        order = list(args[1])
        back = [order.index(d - len(order) if d - len(order) in order else d) for d in range(len(order))]
        return _call(program, write, aten.permute.default, (new, back))
    if op in _RESHAPES:
        return _call(program, write, aten.reshape_as.default, (new, source))
    if op not in (aten.expand, aten.expand_as):
        return new  # a cast to the dtype that is already there, an alias
    raise CaptureError(f"{op}: a write in place through this view can't be cut{line(write)}")


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    for value, schema in zip(node.args, node.target._schema.arguments, strict=False):
        if schema.name == name:
            return value
    return node.kwargs.get(name, default)


def _call(
    program: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None, *, value: Any = None
) -> fx.Node:
    new = program.call_function(target, args, dict(kwargs or {}))
    new.meta = {k: v for k, v in like.meta.items() if k != "val"}
    new.meta["val"] = next(a for a in args if isinstance(a, fx.Node)).meta["val"] if value is None else value
    if packet(new) in (aten.expand_as, aten.reshape_as):
        new.meta["val"] = args[1].meta["val"]
    elif packet(new) in (aten.transpose, aten.t, aten.permute):
        new.meta["val"] = target(*[a.meta["val"] if isinstance(a, fx.Node) else a for a in args])
    return new


def line(node: fx.Node) -> str:
    """ " (file:line, code)" of the model's code that made the node, or nothing."""
    trace = [row.strip() for row in str(node.meta.get("stack_trace", "")).splitlines() if row.strip()]
    return f" ({trace[-2]}: {trace[-1]})" if len(trace) >= 2 else ""
