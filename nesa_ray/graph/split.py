"""(Captured, stage of each node) -> one program per stage: its operators, what they take and what they give.

A StageProgram is plain data (instructions, names), so it pickles, prints and travels; `StageModule` makes it run.
"""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nesa_ray.errors import InvalidPlan
from nesa_ray.graph.attention import scaled_dot_product
from nesa_ray.graph.capture import Captured, is_size
from nesa_ray.graph.graph import NodeId
from nesa_ray.graph.modes import Mode, bind_mode
from nesa_ray.graph.opaque import TARGET as BOUNDARY
from nesa_ray.graph.opaque import Opaque
from nesa_ray.graph.saved import differentiable
from nesa_ray.products import PRODUCTS


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of another instruction, in an instruction's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operator call; `target` is "aten.add.Tensor", "operator.getitem" and the like."""

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values it reads, parameters and buffers (STATE) among them; as often as it names them."""
        return tuple(_refs((self.args, self.kwargs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgram:
    """One stage's computation.

    inputs          the user's inputs that the stage reads, by name
    receives        value -> the stage that makes it
    sends           value -> the stages that read it
    results         the module's outputs, at the final stage (those made elsewhere come to it); empty at the others
    state           names of the parameters and buffers the stage owns
    borrows         parameter -> the stage that owns it (tied weights): its value comes once a step
    lends           parameter -> the stages that borrow it
    differentiable  received, sent and resulting values that carry a gradient
    instructions    in an order that can run
    opaque          submodules executed as they are, by the names that the instructions have for them
    training        captured in training mode: evaluation turns dropout off and reads running statistics
    """

    id: int
    inputs: tuple[str, ...]
    receives: Mapping[str, int]
    sends: Mapping[str, tuple[int, ...]]
    results: tuple[str, ...]
    state: tuple[str, ...]
    trainable: frozenset[str]
    borrows: Mapping[str, int]
    lends: Mapping[str, tuple[int, ...]]
    differentiable: frozenset[str]
    instructions: tuple[Instruction, ...]
    training: bool = True
    opaque: Mapping[str, Opaque] = field(default_factory=dict)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of forward's arguments, in order."""
        return (*self.inputs, *self.receives)

    @property
    def returns(self) -> tuple[str, ...]:
        """Names of the values that forward returns, in order."""
        return tuple(dict.fromkeys((*self.sends, *self.results)))

    @property
    def state_in_use(self) -> tuple[str, ...]:
        """Names of parameters and buffers, owned or borrowed, in the order in which they are first read."""
        reads = (r for i in self.instructions for r in i.reads)
        return tuple(dict.fromkeys(r.removeprefix(STATE) for r in reads if r.startswith(STATE)))


def split(captured: Captured, stage_of: Mapping[NodeId, int]) -> tuple[StageProgram, ...]:
    """One program per stage, in the order in which `stage_of` (a Plan's) names them.

    Raises InvalidPlan when it doesn't name each node of this graph.
    """
    placed = {n: stage_of[i] for n, i in captured.node_id.items() if i in stage_of}
    missing = [n for n in captured.node_id if n not in placed]
    if missing or len(placed) != len(stage_of):
        what = f"node {missing[0]} is in no stage" if missing else "it has nodes of another graph"
        raise InvalidPlan(f"plan: doesn't fit the captured graph {captured.graph.name}: {what}")
    final = _final_stage(captured, placed)
    writers = [_StageWriter(captured, placed, s, final) for s in dict.fromkeys(stage_of.values())]
    flows = {n.name for n in differentiable(captured.program, captured.trainable) if n.op != "get_attr"}
    owner: dict[str, int] = {}
    borrowers: dict[str, list[int]] = {}
    for w in writers:
        for name in w.state:
            if name in captured.trainable and owner.setdefault(name, w.stage) != w.stage:
                borrowers.setdefault(name, []).append(w.stage)
    consumers: dict[str, list[int]] = {}
    for w in writers:
        for value in w.receives:
            consumers.setdefault(value, []).append(w.stage)
    results = tuple(dict.fromkeys(o for o in captured.outputs if isinstance(o, str)))
    for o in results:
        if o in placed and placed[o] != final and final not in consumers.setdefault(o, []):
            consumers[o].append(final)
            next(w for w in writers if w.stage == final).receives.setdefault(o)
    programs = []
    for w in writers:
        sends = {v: tuple(to) for v, to in consumers.items() if placed[v] == w.stage}
        mine = results if w.stage == final else ()
        values = set(w.receives) | set(sends) | set(mine)
        state = tuple(n for n in w.state if w.stage not in borrowers.get(n, []))
        programs.append(
            StageProgram(
                id=w.stage,
                inputs=tuple(w.inputs),
                receives={v: placed[v] for v in w.receives},
                sends=sends,
                results=mine,
                state=state,
                trainable=frozenset(n for n in state if n in captured.trainable),
                borrows={n: owner[n] for n in w.state if w.stage in borrowers.get(n, [])},
                lends={n: tuple(to) for n, to in borrowers.items() if owner[n] == w.stage},
                differentiable=frozenset(values & flows),
                instructions=tuple(w.instructions),
                training=captured.training,
                opaque={k: o for k, o in captured.opaque.items() if k in w.opaque},
            )
        )
    return tuple(programs)


def _final_stage(captured: Captured, placed: Mapping[str, int]) -> int:
    """The stage where the outputs come together: of those that make one, the last in the order of stages."""
    makers = {placed[o] for o in captured.outputs if isinstance(o, str) and o in placed}
    if not makers:
        return placed[list(captured.node_id)[-1]]
    return max(makers, key=_stage_order(captured, placed).index)


def _stage_order(captured: Captured, placed: Mapping[str, int]) -> list[int]:
    """The stages, producers before consumers; raises InvalidPlan when they form a cycle."""
    by_id = {i: placed[n] for n, i in captured.node_id.items()}
    before: dict[int, set[int]] = {s: set() for s in dict.fromkeys(placed.values())}
    for u, v in captured.graph.edges:
        if by_id[int(u)] != by_id[int(v)]:
            before[by_id[int(v)]].add(by_id[int(u)])
    order: list[int] = []
    while len(order) < len(before):
        done = set(order)
        ready = [s for s, sources in before.items() if s not in done and sources <= done]
        if not ready:
            raise InvalidPlan(f"plan: stages {[s for s in before if s not in done]} form a cycle")
        order += ready
    return order


def stage_links(programs: Iterable[StageProgram]) -> dict[int, set[int]]:
    """Stage -> the stages that it sends to, results on their way to the final stage among them."""
    return {p.id: {stage for readers in p.sends.values() for stage in readers} for p in programs}


class _StageWriter:
    """Writes the instructions of one stage: its placed nodes, and the free nodes they need, computed again here."""

    def __init__(self, captured: Captured, placed: Mapping[str, int], stage: int, final: int) -> None:
        self.stage = stage
        self.inputs: dict[str, None] = {}
        self.receives: dict[str, None] = {}
        self.state: dict[str, None] = {}
        self.instructions: list[Instruction] = []
        self.opaque: set[str] = set()
        self._written: set[str] = set()
        self._placed = placed
        self._by_name = {n.name: n for n in captured.program.nodes}
        mine = [n for n in captured.program.nodes if placed.get(n.name) == stage]
        results = [o for o in captured.outputs if isinstance(o, str) and o not in placed]
        for n in mine:
            for s in n.all_input_nodes:
                self._declare(s)
        extra = [self._by_name[o] for o in results] if stage == final else []
        for n in extra:
            self._declare(n)
        for n in (*mine, *extra):
            self._write(n)

    def _declare(self, n: fx.Node) -> None:
        """Notes the inputs and received values that `n` needs, sizes aside: they are arguments, before everything."""
        if is_size(n):
            return
        if n.op == "placeholder":
            self.inputs.setdefault(n.name)
        elif n.op == "get_attr":
            self.state.setdefault(str(n.target))
        elif n.name in self._placed:
            if self._placed[n.name] != self.stage:
                self.receives.setdefault(n.name)
        else:
            for s in n.all_input_nodes:
                self._declare(s)

    def _write(self, n: fx.Node) -> None:
        if n.name in self._written or n.name in self.inputs or n.name in self.receives or n.op == "get_attr":
            return
        self._written.add(n.name)
        if is_size(n) and n.target is torch.ops.aten.sym_size.int:
            source, dimension = self._with_size(n)
            self.instructions.append(Instruction(n.name, str(n.target), (Ref(source), dimension), {}))
            return
        for s in n.all_input_nodes:
            self._write(s)
        refer = _reference(n)
        if "opaque" in n.meta:
            self.opaque.add(str(n.args[0]))
        self.instructions.append(Instruction(n.name, _target(n.target), refer(n.args), refer(n.kwargs)))

    def _with_size(self, n: fx.Node) -> tuple[str, int]:
        """A tensor at hand, and its dimension, of the size that `n` asks for."""
        wanted = n.meta["val"]
        source, dimension = n.args
        assert isinstance(source, fx.Node)
        assert isinstance(dimension, int)
        if source.name in self.inputs or source.name in self.receives:
            return source.name, dimension
        for name in (*self.inputs, *self.receives):
            value = self._by_name[name].meta.get("val")
            if isinstance(value, torch.Tensor):
                for d, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                        return name, d
        if source.op == "placeholder":
            self.inputs.setdefault(source.name)
        elif self._placed.get(source.name) == self.stage:
            self._write(source)
        else:
            self.receives.setdefault(source.name)
        return source.name, dimension


def _target(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    return f"{'operator' if hasattr(operator, function.__name__) else 'torch'}.{function.__name__}"


def _reference(n: fx.Node) -> Callable[[Any], Any]:
    """Replaces the nodes in an argument by Refs; state is named STATE + its name."""

    def one(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return Ref(f"{STATE}{a.target}" if a.op == "get_attr" else a.name)
        if isinstance(a, list | tuple):
            return type(a)(one(x) for x in a) if not isinstance(a, slice) else a
        if isinstance(a, dict):
            return {k: one(v) for k, v in a.items()}
        return a

    def plain(a: Any) -> Any:
        a = one(a)
        return dict(a) if isinstance(a, Mapping) else tuple(a)

    return plain


STATE = "state:"  # the names of Refs to parameters and buffers begin with it
ATTENTION = "nesa.attention.default"
_CALL = re.compile(r" (v_\w+) = f(\d+)\(")
AttentionBinding = Callable[[Instruction], Any]


class StageModule(torch.nn.Module):
    """A stage that runs: forward(*values of program.arguments) -> tuple of the values of program.returns.

    `state` gives the owned parameters and buffers; `state_dict()` has the whole module's names.  `attention` binds each
    attention node: given its instruction, a callable with nesa::attention's signature (an nn.Module becomes a child).
    So it does every other instruction whose target begins with "nesa.".
    `operators` replaces operators by target, like "aten.linear.default" (see products.py, runtime/weight_gradient.py).
    `run` takes the weights from its caller instead (a training step's leaves, borrowed parameters among them).
    `moded` says whether any of its operators act otherwise in training (dropout, batch normalisation).
    """

    def __init__(
        self,
        program: StageProgram,
        state: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        attention: AttentionBinding | None = None,
        operators: Mapping[str, Callable[..., Any]] = PRODUCTS,
    ) -> None:
        super().__init__()
        self.program = program
        device = torch.device(device)
        for name in program.state:
            value, trainable = state[name].to(device), name in program.trainable
            if trainable or isinstance(value, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=trainable)
            register(self, name, value)
        bound: dict[str, Callable[..., Any]] = {}
        self._names = (*program.state, *program.borrows)
        names = {n: f"s{i}" for i, n in enumerate(self._names)}
        dead = _dead_after(program)
        lines = [f"def forward({', '.join(('mode', 'state', *map(_identifier, program.arguments)))}):"]
        if names:
            lines.append(f" {', '.join(names.values())}, = state")
        self.moded = False
        for i, step in enumerate(program.instructions):
            opaque = program.opaque[str(step.args[0])] if step.target == BOUNDARY else None
            supplied = attention is not None and step.target.startswith("nesa.") and opaque is None
            operation = function = attention(step) if attention and supplied else _resolve(step.target)
            if step.target == ATTENTION and not supplied:
                function = scaled_dot_product
            function = operators.get(step.target, function)
            if isinstance(function, torch.nn.Module):
                self.add_module(f"attention_{i}", function)
            args = [_source(a, names, bound, device) for a in step.args]
            kwargs = [f"{k}={_source(v, names, bound, device)}" for k, v in step.kwargs.items()]
            moded = None if supplied else bind_mode(step.name, operation, step.args, function)
            if opaque is not None:
                moded = opaque.bind(step.name)
            if moded is not None:
                function, self.moded = moded, True
                kwargs.append("mode=mode")
            bound[f"f{i}"] = function
            lines.append(f" {_identifier(step.name)} = f{i}({', '.join((*args, *kwargs))})")
            if i in dead:
                lines.append(f" del {', '.join(dead[i])}")
        lines.append(f" return ({''.join(_identifier(r) + ', ' for r in program.returns)})")
        self.code = "\n".join(lines)
        namespace: dict[str, Any] = dict(bound)
        exec(compile(self.code, f"<stage {program.id}>", "exec"), namespace)
        self._run = namespace["forward"]
        self._owned = [_locate(self, n) for n in program.state]

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs the stage's instructions on its own state, in evaluation."""
        return self._run(self._mode(None), [getattr(holder, leaf) for holder, leaf in self._owned], *values)

    def run(
        self, weights: Mapping[str, torch.Tensor], *values: torch.Tensor, seed: int | None = None, again: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Runs the stage's instructions on `weights`: its state and its borrowed parameters by name.

        With a seed, as in training: it is the micro-batch's, the same at every stage; running statistics are updated in
        place.  `again` computes the same once more (recompute) without writing to them.  Without a seed: in evaluation.
        """
        return self._run(self._mode(seed, again), [weights[n] for n in self._names], *values)

    def marked(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """`run` with a first argument more: mark(i, value) is called after each instruction i, with what it made."""
        lines = [self.code.splitlines()[0].replace("(mode", "(mark, mode")]
        for text in self.code.splitlines()[1:]:
            lines.append(text)
            if (made := _CALL.match(text)) is not None:
                lines.append(f" mark({made[2]}, {made[1]})")
        namespace = dict(self._run.__globals__)
        exec(compile("\n".join(lines), f"<marked stage {self.program.id}>", "exec"), namespace)
        function = namespace["forward"]

        def run(mark: Any, weights: Mapping[str, torch.Tensor], *values: torch.Tensor, seed: int | None = None) -> Any:
            return function(mark, self._mode(seed), [weights[n] for n in self._names], *values)

        return run

    def _mode(self, seed: int | None, again: bool = False) -> Mode:
        return Mode(seed, again, evaluation=seed is None and self.program.training)

    def __getstate__(self) -> Any:
        raise TypeError("a StageModule doesn't travel; send its program and state")


def _dead_after(program: StageProgram) -> dict[int, list[str]]:
    """Instruction -> the values no later one reads: dropped there, so that activations are freed as early as can be."""
    last: dict[str, int] = {}
    for i, step in enumerate(program.instructions):
        last.setdefault(step.name, i)
        for r in step.reads:
            last[r] = i
    dead: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in program.returns and not name.startswith(STATE):
            dead.setdefault(i, []).append(_identifier(name))
    return dead


def _refs(value: Any) -> Iterable[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _refs(v)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for v in value:
            yield from _refs(v)


def _identifier(name: str) -> str:
    return f"v_{name}"


def _source(value: Any, names: Mapping[str, str], bound: dict[str, Any], device: torch.device) -> str:
    """Python source of an argument; what has none (dtypes, …) becomes a bound constant."""
    if isinstance(value, Ref):
        return names[value.name.removeprefix(STATE)] if value.name.startswith(STATE) else _identifier(value.name)
    if isinstance(value, list | tuple):
        inner = ", ".join(_source(v, names, bound, device) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return repr(value)
    if isinstance(value, torch.device):
        value = device
    name = f"c{len(bound)}"
    bound[name] = value
    return name


_HOMES = {"transformers": "transformers.integrations.moe", "torchvision": "torchvision"}  # who registers operators


def _histogram(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """histc, whose CPU kernel takes no integers: captured on the meta device, a mixture of experts counts them."""
    return torch.histc(x.float() if x.device.type == "cpu" and not x.is_floating_point() else x, *args, **kwargs)


def _resolve(target: str) -> Callable[..., Any]:
    if target == "aten.histc.default":
        return _histogram
    if target.startswith("operator."):
        return getattr(operator, target.removeprefix("operator."))
    if target.count(".") == 1:
        return getattr(torch, target.removeprefix("torch."))
    namespace, op, overload = target.split(".")
    if namespace in _HOMES and not hasattr(getattr(torch.ops, namespace), op):
        importlib.import_module(_HOMES[namespace])
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def register(root: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Gives `root` the tensor itself under a dotted name: a Parameter as a parameter, anything else as a buffer."""
    holder, leaf = _locate(root, name)
    if isinstance(value, torch.nn.Parameter):
        holder.register_parameter(leaf, value)
    else:
        holder.register_buffer(leaf, value)


def _locate(root: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The child module that holds `name`, made if missing, and the leaf's name in it."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]
    return root, leaf
