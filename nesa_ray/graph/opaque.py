"""Submodules that the user names as boundaries: each is one operator of the graph, executed as it is inside a stage.

For code that can't be traced (control flow by values, `.item()`): the model around it is captured as usual, and the cut
can go anywhere but through it.  The submodule's class travels by reference, its weights as any other stage's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from nesa_ray.errors import CaptureError
from nesa_ray.graph.modes import Mode, derive_seed

LIBRARY = torch.library.Library("nesa", "FRAGMENT")
LIBRARY.define("module(str key, Tensor[] inputs, Tensor[] state) -> Tensor[]")
TARGET = "nesa.module.default"


@dataclass(frozen=True)
class Opaque:
    """One boundary.  `skeleton` is the submodule without values; `state` its tensors' names in it, in order.

    flops and saved_bytes are those of the example's forward.
    """

    skeleton: torch.nn.Module = field(repr=False)
    state: tuple[str, ...]
    inputs: tuple[Any, ...] = field(repr=False)
    in_spec: Any = field(repr=False)
    out_spec: Any = field(repr=False)
    outputs: tuple[torch.Tensor, ...] = field(repr=False)
    flops: float
    saved_bytes: int

    def bind(self, name: str) -> Callable[..., Any]:
        """The operator as a function that also takes `mode` (modes.py); `name` is the instruction's."""

        evaluating = copy.deepcopy(self.skeleton).eval()

        def run(_: str, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor], *, mode: Mode) -> Any:
            given = iter(inputs)
            flat = [next(given) if isinstance(i, torch.Tensor) else i for i in self.inputs]
            args, kwargs = pytree.tree_unflatten(flat, self.in_spec)
            values = dict(zip(self.state, state, strict=True))
            if mode.again:  # its own copies of the buffers: nothing is written twice
                buffers = {n for n, _ in self.skeleton.named_buffers()}
                values = {n: t.clone() if n in buffers else t for n, t in values.items()}
            skeleton = evaluating if mode.evaluation else self.skeleton
            with ExitStack() as stack:
                if mode.seed is not None:
                    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
                    stack.enter_context(torch.random.fork_rng(devices=devices))
                    torch.manual_seed(derive_seed(mode.seed, name))
                made = torch.func.functional_call(skeleton, values, args, kwargs)
            return [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]

        return run


_CAPTURING: ContextVar[Mapping[str, Opaque]] = ContextVar("the boundaries of the module that is being captured")


@torch.library.register_fake("nesa::module")
def _shapes(key: str, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    device = next((t.device for t in (*inputs, *state)), torch.device("cpu"))
    return [torch.empty(t.shape, dtype=t.dtype, device=device) for t in _CAPTURING.get()[key].outputs]


@contextmanager
def boundaries(
    module: torch.nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[dict[str, Opaque]]:
    """Within, each named submodule of `module` is one call of nesa::module; yields what was seen of it, by name.

    Runs the module once on the arguments, which must be real.  Raises CaptureError for a name that isn't there, lies
    inside another boundary, is called more than once, or gives no tensors.
    """
    for name in names:
        if name not in dict(module.named_modules()) or not name:
            raise CaptureError(f"boundaries: {type(module).__name__} has no submodule {name!r}")
        inside = next((o for o in names if o != name and name.startswith(f"{o}.")), None)
        if inside:
            raise CaptureError(f"boundaries: {name} lies inside {inside}")
    seen = _watch(module, names, args, kwargs) if names else {}
    with ExitStack() as stack:
        for name, opaque in seen.items():
            submodule = module.get_submodule(name)
            submodule.forward = _stand_in(name, submodule, opaque)
            stack.callback(submodule.__dict__.pop, "forward")
        token = _CAPTURING.set(seen)
        stack.callback(_CAPTURING.reset, token)
        yield seen


def mark(program: fx.Graph, seen: Mapping[str, Opaque]) -> None:
    """Notes in each nesa::module node what it stands for."""
    for n in program.nodes:
        if n.op == "call_function" and str(n.target) == TARGET:
            n.meta["opaque"] = seen[str(n.args[0])]


def _watch(
    module: torch.nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Opaque]:
    seen: dict[str, Opaque] = {}
    twin = copy.deepcopy(module)  # running it once must not move running statistics
    with ExitStack() as stack:
        for name in names:
            submodule = twin.get_submodule(name)
            submodule.forward = _watched(name, submodule, submodule.forward, seen)
            stack.callback(submodule.__dict__.pop, "forward")
        with torch.random.fork_rng(devices=[]):
            twin(*args, **kwargs)
    missing = [n for n in names if n not in seen]
    if missing:
        raise CaptureError(f"boundaries: {missing[0]} isn't called")
    return seen


def _watched(name: str, submodule: torch.nn.Module, forward: Any, seen: dict[str, Opaque]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if name in seen:
            raise CaptureError(f"boundaries: {name} is called more than once")
        flat, in_spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in flat):
            raise CaptureError(f"boundaries: {name} needs real weights and arguments: it is executed, not traced")
        owned = {t.untyped_storage().data_ptr() for t in (*submodule.parameters(), *submodule.buffers())}
        kept: dict[int, torch.Tensor] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in owned:
                kept[t.untyped_storage().data_ptr()] = t
            return t

        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made = forward(*args, **kwargs)
        outputs, out_spec = pytree.tree_flatten(made)
        if not outputs or not all(isinstance(t, torch.Tensor) for t in outputs):
            raise CaptureError(f"boundaries: {name}: gives {type(made).__name__}, needs tensors")
        skeleton = copy.deepcopy(submodule)
        skeleton.__dict__.pop("forward", None)
        state = (*dict(submodule.named_parameters()), *dict(submodule.named_buffers()))
        seen[name] = Opaque(
            skeleton=skeleton.to("meta"),
            state=state,
            inputs=tuple(torch.empty(0) if isinstance(t, torch.Tensor) else t for t in flat),
            in_spec=in_spec,
            out_spec=out_spec,
            outputs=tuple(t.detach().to("meta") for t in outputs),
            flops=float(counter.get_total_flops()),
            saved_bytes=sum(t.untyped_storage().nbytes() for t in kept.values()),
        )
        return made

    return run


def _stand_in(name: str, submodule: torch.nn.Module, opaque: Opaque) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        flat = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        tensors = dict(submodule.named_parameters()) | dict(submodule.named_buffers())
        made = torch.ops.nesa.module(name, flat, [tensors[n] for n in opaque.state])
        return pytree.tree_unflatten(made, opaque.out_spec)

    return call
