"""nn.Module -> Captured: its operators as one graph, made by torch.export, on the meta device if the module is there.

A captured program has three kinds of fx nodes besides inputs and outputs:
  placed   an operator that the plan puts in exactly one stage; these are the nodes of the Graph
  free     a cheap function of the user's inputs alone (positions, rotary angles, sizes): every stage that needs its
           value computes it again, so it never crosses a link
  state    a parameter or buffer (get_attr), by its name in the module
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from nesa_ray.errors import CaptureError, CheckpointError
from nesa_ray.garbage import uncollected
from nesa_ray.graph.graph import Graph
from nesa_ray.graph.opaque import Opaque, mark
from nesa_ray.graph.opaque import boundaries as at_boundaries
from nesa_ray.graph.placing import place
from nesa_ray.graph.program import flatten, is_size, packet_name

__all__ = ["Captured", "capture", "is_size", "packet_name"]


@dataclass(frozen=True)
class Captured:
    """A module's computation: `graph` for the planner, `program` for the splitter, `state` by the module's names.

    inputs     name of each flattened user input; None where a constant was captured
    outputs    fx node name of each flattened output, or the constant itself wrapped in a 1-tuple
    state      parameters and buffers by name; on the meta device where the module had none
    trainable  names of the parameters that require a gradient
    aliases    other names of the same parameter (tied weights) -> the name that `state` has
    node_id    fx node name -> Graph node id, for placed nodes
    training   the module was in training mode: dropout and running statistics are in it, and can be switched off
    opaque     the submodules that were named as boundaries
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
    training: bool = True
    opaque: Mapping[str, Opaque] = field(default_factory=dict, repr=False)

    def weights(self, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The captured state with `state`'s values in place of its own; raises CheckpointError where one has none."""
        given = {self.aliases.get(n, n): t for n, t in (state or {}).items()}
        weights = {**self.state, **given}
        empty = [n for n in self.state if weights[n].device.type == "meta"]
        if empty:
            raise CheckpointError(f"state: {len(empty)} tensors have no values, the first is {empty[0]}")
        return weights

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


@uncollected()
def capture(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    name: str = "",
    boundaries: Sequence[str] = (),
) -> Captured:
    """Captures one forward pass; costs are at the shapes of `args` (one micro-batch), which may be on the meta device.

    `boundaries` names submodules that can't be traced, or needn't be: each becomes one operator, executed as it is
    inside a stage (opaque.py); the module and `args` must then be real.  `dynamic_shapes` is torch.export's: dimensions
    that may differ at run time.  The module isn't changed.
    Raises CaptureError, naming the line of the model's code, where the computation can't be one graph.
    """
    kwargs = dict(kwargs or {})
    try:
        with warnings.catch_warnings(), at_boundaries(module, boundaries, args, kwargs) as opaque:
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, tuple(args), kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except CaptureError:
        raise
    except Exception as e:
        raise CaptureError(_refusal(module, e)) from e
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    every = dict(module.named_parameters(remove_duplicate=False))
    canonical = {id(p): n for n, p in module.named_parameters()}
    aliases = {n: canonical[id(p)] for n, p in every.items() if canonical[id(p)] != n}
    flat = flatten(exported, aliases)
    state |= flat.constants
    mark(flat.program, opaque)
    used = {str(n.target) for n in flat.program.nodes if n.op == "get_attr"}
    trainable = frozenset(n for n, p in module.named_parameters() if p.requires_grad and n in used)
    graph, node_id = place(flat.program, state, trainable, name or type(module).__name__)
    return Captured(
        graph=graph,
        program=flat.program,
        inputs=flat.inputs,
        in_spec=exported.call_spec.in_spec,
        outputs=flat.outputs,
        out_spec=exported.call_spec.out_spec,
        state={n: t.detach() for n, t in state.items() if n in used},
        trainable=trainable,
        aliases=aliases,
        node_id=node_id,
        training=module.training,
        opaque=opaque,
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
