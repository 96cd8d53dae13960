"""What one operator keeps from its forward for its backward, in terms of the values of the graph.

From torch's derivative formulas (tools/autograd/derivatives.yaml).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence

import torch
from torch import fx

from nesa_ray.graph.cost import is_view, n_bytes, number, packet, shape

aten = torch.ops.aten

# Operators whose backward needs nothing but shapes.
_NOTHING = {
    aten.add, aten.sub, aten.rsub, aten.neg, aten.sum, aten.mean, aten.cat, aten.stack, aten.to, aten._to_copy,
    aten.clone, aten.contiguous, aten.reshape, aten.flatten, aten.pad, aten.constant_pad_nd, aten.roll, aten.flip,
    aten.cumsum, aten.zeros_like, aten.ones_like, aten.repeat, aten.repeat_interleave, aten.slice_scatter,
    aten.select_scatter, aten.tril, aten.triu, aten.type_as, aten.pixel_shuffle, aten.upsample_nearest2d,
    aten.upsample_bilinear2d, aten.fill, aten.reshape_as,
}  # fmt: skip
# Operators whose backward needs their output, not their input.
_OUTPUT = {
    aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.rsqrt, aten.sqrt, aten.exp, aten.tanh,
    aten.sigmoid, aten.relu, aten.reciprocal,
}  # fmt: skip
# Operators whose backward needs where elements came from: their integer and boolean arguments.
_PLACES = {
    aten.embedding, aten.index, aten.gather, aten.index_select, aten.masked_fill, aten.where, aten.scatter,
    aten.index_put, aten.index_add, aten.take_along_dim,
}  # fmt: skip
_PRODUCTS = {aten.mul, aten.matmul, aten.mm, aten.bmm}
_DROPOUTS = {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.native_dropout}
_MATRIX = {aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose1d,
           aten.conv_transpose2d, aten.conv_transpose3d}  # fmt: skip
_ATTENTIONS = {torch.ops.nesa.attention, aten.scaled_dot_product_attention}


def differentiable(program: fx.Graph, trainable: Collection[str]) -> set[fx.Node]:
    """Nodes through which a gradient flows to a trainable parameter, those parameters among them."""
    flows: set[fx.Node] = set()
    for n in program.nodes:
        value = n.meta.get("val")
        if n.op == "get_attr":
            if n.target in trainable:
                flows.add(n)
        elif n.op == "call_function" and n.target is not aten.detach.default:
            floating = not isinstance(value, torch.Tensor) or value.is_floating_point()
            number = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)
            if floating and not number and any(s in flows for s in n.all_input_nodes):
                flows.add(n)
    return flows


def saved(node: fx.Node, flows: set[fx.Node]) -> tuple[Sequence[fx.Node], int]:
    """(values of the graph that the backward keeps, bytes of what it keeps besides: masks, statistics, indices)."""
    op, args = packet(node), node.args
    if node not in flows or is_view(node) or op in _NOTHING or node.target is operator.getitem:
        return (), 0
    if (opaque := node.meta.get("opaque")) is not None:
        return (), opaque.saved_bytes
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    floating = [a for a in tensors if a.meta["val"].is_floating_point()]
    out = node.meta.get("val")
    if op in _OUTPUT:
        return (node,), 0
    if op in _PLACES:
        return [a for a in tensors if not a.meta["val"].is_floating_point()], 0
    if op in _DROPOUTS:
        return (), n_bytes(out) if args[1] and args[2] else 0
    if op in _PRODUCTS:
        a, b = (*args, None)[:2]
        return [x for x, other in ((a, b), (b, a)) if isinstance(x, fx.Node) and other in flows], 0
    if op is aten.div:
        a, b = args[:2]
        if not isinstance(b, fx.Node):
            return (), 0
        return ([x for x in (a, b) if isinstance(x, fx.Node)] if b in flows else [b]), 0
    if op in _MATRIX:
        return ([a for a in args[:1] if isinstance(a, fx.Node)] if args[1] in flows else []), 0
    if op in (aten.addmm, aten.baddbmm):
        return [a for a in args[1:3] if isinstance(a, fx.Node)], 0
    if op in (aten.layer_norm, aten.native_layer_norm):
        normalised = args[1] if isinstance(args[1], list | tuple) else [args[1]]
        return floating[:1], 8 * math.prod(shape(floating[0].meta["val"])[: -len(normalised)])
    if op is aten.group_norm:
        x = shape(floating[0].meta["val"])
        return floating[:1], 8 * x[0] * number(args[1])
    if op in (aten.batch_norm, aten.instance_norm):
        return floating[:1], 8 * shape(floating[0].meta["val"])[1]
    if op in (aten.max_pool2d, aten.max_pool1d):
        return floating[:1], 8 * math.prod(shape(out))
    if op in (aten.topk, aten.sort, aten.max, aten.min):
        return (), 0  # the indices, which are an output
    if op in _ATTENTIONS:
        return _attention(node)
    if op is aten.lstm:  # gates, cells and hidden states of every step
        return floating[:1], 8 * n_bytes(out[0]) * number(args[4])
    return [a for a in floating if a.op != "get_attr"], 0


def _attention(node: fx.Node) -> tuple[Sequence[fx.Node], int]:
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    assert isinstance(v, fx.Node)
    batch, heads, tokens, _ = shape(q.meta["val"])
    if packet(node) is torch.ops.nesa.attention and node.args[7]:  # softcap: the scores are spelled out
        scores = batch * heads * tokens * shape(k.meta["val"])[2] * q.meta["val"].element_size()
        repeated = n_bytes(k.meta["val"]) * (heads // shape(k.meta["val"])[1])
        return (q,), 2 * scores + 2 * repeated
    return (q, k, v, node), 4 * batch * heads * tokens
