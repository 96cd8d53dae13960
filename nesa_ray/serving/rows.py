"""Stage programs made ready to serve: dropout off, and the logits computed only where a token is sampled.

Tokens of a step lie flat, [1, T], and only some rows are sampled.  Walking back from the logits, operators that treat
tokens one by one can run on those rows alone; `prepare` inserts the selection before them, as far up as the last
operator that mixes tokens.  It reads shapes and operators only, so no architecture needs code here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from nesa_ray.errors import CaptureError
from nesa_ray.graph.capture import Captured, is_size, packet_name
from nesa_ray.graph.cost import number
from nesa_ray.graph.graph import Node
from nesa_ray.graph.split import ATTENTION, STATE, Instruction, Ref, StageProgram
from nesa_ray.serving.pooling import hidden_states

ROWS = "rows"  # the added input: [R] int64, the tokens whose logits are wanted
_ROWS_COUNT = "rows_count"
_SUFFIX = "__rows"


@dataclass(frozen=True)
class Served:
    """Programs ready to serve, and the names of what goes in and out.

    hidden    the last hidden states, which the stage that makes the logits gives too; None where it hasn't them
    selected  instructions computed on the rows of ROWS alone
    """

    programs: tuple[StageProgram, ...]
    tokens: str
    positions: str
    logits: str
    hidden: str | None
    selected: frozenset[str]


def prepare(captured: Captured, programs: Iterable[StageProgram]) -> Served:
    """The programs with dropout off and the logits computed for the tokens in the input `rows` only: [1, R, V].

    Raises CaptureError when the model isn't a decoder over token and position ids, or mixes tokens other than by
    attention.
    """
    tokens, positions = _inputs(captured)
    logits = captured.outputs[0]
    dimension = token_dimension(captured, tokens)
    _refuse_mixing(captured, dimension, tokens)
    region = _region(captured, dimension, logits)
    writer = _RowWriter({n.name: n for n in captured.program.nodes}, region, dimension, positions)
    selected = [writer.rewrite(frozen(p), logits) for p in programs]
    made = {r for p in selected for r in p.results}
    logits = logits if logits in made else logits + _SUFFIX
    sampler = next(p for p in selected if logits in p.results)
    hidden = hidden_states(sampler, logits)
    if hidden is not None:
        selected[selected.index(sampler)] = replace(sampler, results=(*sampler.results, hidden))
    return Served(
        programs=tuple(selected),
        tokens=tokens,
        positions=positions,
        logits=logits,
        hidden=hidden,
        selected=frozenset(region),
    )


def frozen(program: StageProgram) -> StageProgram:
    """The program in evaluation mode; a tied weight, which never changes, is each stage's own."""

    def off(step: Instruction) -> Instruction:
        if step.target == "aten.dropout.default":
            return replace(step, args=(step.args[0], step.args[1], False))
        return step

    return replace(
        program,
        instructions=tuple(off(i) for i in program.instructions),
        state=(*program.state, *program.borrows),
        trainable=frozenset(),
        borrows={},
        lends={},
    )


_POINTWISE_LIKE = {
    "to", "type_as", "_to_copy", "dropout", "detach", "clone", "contiguous", "alias", "embedding", "getitem",
}  # fmt: skip
_RESHAPES = {"view", "reshape", "_unsafe_view", "unflatten", "flatten", "unsqueeze", "squeeze", "expand"}
_VIEWS = {*_RESHAPES, "transpose", "permute"}
_MIXERS = {"conv1d", "convolution", "lstm", "gru", "rnn_tanh", "cumsum", "cumprod", "flip", "roll", "fft_fft"}


def token_dimension(captured: Captured, tokens: str) -> Callable[[fx.Node], int | None]:
    """node -> the dimension of its value that runs over tokens; None where none does; -1 where it can't be told."""
    shape = next(n for n in captured.program.nodes if n.name == tokens).meta["val"].shape
    if not isinstance(shape[1], torch.SymInt):
        raise CaptureError(f"{captured.graph.name}: needs a dynamic token dimension to be served")
    batch, length = (s.node.expr if isinstance(s, torch.SymInt) else s for s in shape)

    def dimension(node: fx.Node) -> int | None:
        value = node.meta.get("val")
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if not isinstance(value, torch.Tensor):
            return None
        exprs = [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]
        over = [i for i, e in enumerate(exprs) if hasattr(e, "free_symbols") and length in e.free_symbols]
        if not over:
            return None
        return over[0] if len(over) == 1 and exprs[over[0]] in (length, batch * length) else -1

    return dimension


def _refuse_mixing(captured: Captured, dimension: Callable[[fx.Node], int | None], tokens: str) -> None:
    """Raises CaptureError where tokens meet otherwise than by causal attention: flattened, strangers would meet."""
    length = next(n for n in captured.program.nodes if n.name == tokens).meta["val"].shape[1].node.expr
    for n in captured.program.nodes:
        if n.name not in captured.node_id:
            continue
        op = packet_name(n)
        where = f"{captured.graph.name}: {n.name} ({op})"
        value = n.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else ()
        if sum(isinstance(s, torch.SymInt) and length in s.node.expr.free_symbols for s in sizes) > 1:
            raise CaptureError(f"{where}: attends without nesa::attention, and only that can be served from a cache")
        if op == "attention":
            if n.args[3] is not None or not n.args[5]:
                raise CaptureError(f"{where}: attention with a bias, or not causal, can't be served from a cache")
        elif op in _MIXERS and dimension(n) is not None:
            along = n.args[1] if op in ("cumsum", "cumprod") else dimension(n)
            if along == dimension(n):
                raise CaptureError(f"{where}: mixes tokens, and only attention can be served from a cache")


def _is_tokenwise(n: fx.Node, dimension: Callable[[fx.Node], int | None]) -> bool:
    """Whether row r of the result depends on row r of the arguments alone."""
    at, op = dimension(n), packet_name(n) or getattr(n.target, "__name__", "")
    inputs = [(s, dimension(s)) for s in n.all_input_nodes if not is_size(s)]
    over = [(s, d) for s, d in inputs if d is not None]
    if at is None or at < 0 or not over or any(d is not None and d < 0 for _, d in inputs):
        return False
    first, d = over[0]
    rank = _rank(first)
    if op in _POINTWISE_LIKE or torch.Tag.pointwise in getattr(n.target, "tags", ()):
        return True
    if op in _RESHAPES:
        return _elements_before(first, d) == _elements_before(n, at)
    if op in ("linear", "mm", "matmul", "addmm"):
        return len(over) == 1 and d != rank - 1 and over[0][0] is n.args[1 if op == "addmm" else 0]
    if op in ("layer_norm", "rms_norm"):
        return d < rank - len(n.args[1])
    if op in ("mean", "sum", "amax", "softmax", "_softmax", "log_softmax"):
        along: Any = n.args[1] if len(n.args) > 1 else None
        along = [along] if isinstance(along, int) else along
        return bool(along) and all(a % rank != d for a in along)
    if op in ("transpose", "permute"):
        return True
    if op in ("slice", "select"):
        return (n.args[1] if len(n.args) > 1 else 0) % rank != d
    if op in ("cat", "split", "split_with_sizes", "chunk"):
        place = 1 if op == "cat" else 2
        return (n.args[place] if len(n.args) > place else 0) % rank != d
    return False


def _rank(n: fx.Node) -> int:
    value = n.meta["val"]
    return (value[0] if isinstance(value, list | tuple) else value).dim()


def _elements_before(n: fx.Node, dimension: int) -> int:
    """Product of the fixed dimensions before the tokens' one."""
    product = 1
    for size in n.meta["val"].shape[:dimension]:
        product *= 1 if isinstance(size, torch.SymInt) else int(size)
    return product


def rows_are_tokens(n: fx.Node, dimension: Callable[[fx.Node], int | None]) -> bool:
    """Whether its value, flat but for the last dimension, has one row for each token, in their order."""
    at = dimension(n)
    return at is not None and at >= 0 and at == _rank(n) - 2 and _elements_before(n, at) == 1


def _region(captured: Captured, dimension: Callable[[fx.Node], int | None], logits: str) -> set[str]:
    """Names of the nodes that can be computed on the sampled rows alone."""
    region: set[str] = set()
    for n in reversed(list(captured.program.nodes)):
        users = [u for u in n.users if u.op != "output"]
        wanted = n.name == logits or (users and all(u.name in region for u in users))
        if wanted and n.name in captured.node_id and _is_tokenwise(n, dimension):
            region.add(n.name)
    for n in captured.program.nodes:  # views at its edge: before the choice of rows they cost nothing, behind it a copy
        if packet_name(n) in _VIEWS and region.isdisjoint(i.name for i in n.all_input_nodes):
            region.discard(n.name)
    return region


def with_served_costs(captured: Captured, sampled_share: float, seen: float) -> Captured:
    """The same program with the costs of serving it.

    Of a step's tokens only `sampled_share` reach the logits, and one sees so many positions of its sequence on average.
    """
    tokens, _ = _inputs(captured)
    region = {captured.node_id[n] for n in _region(captured, token_dimension(captured, tokens), captured.outputs[0])}
    count = next(n for n in captured.program.nodes if n.name == tokens).meta["val"].shape[1]

    def cost(node: Node) -> Node:
        if node.op == ATTENTION:  # captured with a sequence of the step's tokens, of which each sees half on average
            return replace(node, flops=node.flops * 2 * seen / number(count))
        if node.id not in region:
            return node
        moved = max(node.access_bytes - node.param_bytes, 0.0) * sampled_share
        return replace(
            node,
            flops=node.flops * sampled_share,
            output_bytes=node.output_bytes * sampled_share,
            access_bytes=min(node.access_bytes, node.param_bytes) + moved,
        )

    graph = captured.graph
    return replace(captured, graph=replace(graph, nodes=tuple(cost(n) for n in graph.nodes)))


def _inputs(captured: Captured) -> tuple[str, str]:
    """Names of the inputs with the token ids and the positions; raises CaptureError."""
    names = [n for n in captured.inputs if n is not None]
    tokens = next((n for n in names if n.startswith("input_ids")), None)
    positions = next((n for n in names if n.startswith("position_ids")), None)
    if tokens is None or positions is None:
        raise CaptureError(f"{captured.graph.name}: needs input_ids and position_ids to be served, has {names}")
    return tokens, positions


@dataclass(frozen=True)
class _RowWriter:
    nodes: Mapping[str, fx.Node]
    region: set[str]
    dimension: Callable[[fx.Node], int | None]
    positions: str

    def rewrite(self, program: StageProgram, logits: str) -> StageProgram:
        """The program with the region's instructions on selected rows."""
        extra: dict[str, None] = {}
        written: list[Instruction] = []
        done: set[str] = set()

        def emit(instruction: Instruction) -> str:
            if instruction.name not in done:
                done.add(instruction.name)
                written.append(instruction)
            return instruction.name

        by_name = {i.name: i for i in program.instructions}

        def on_rows(name: str) -> str:
            """The name of a value's version on the selected rows."""
            node = self.nodes.get(name)
            if name.startswith(STATE) or name in self.region or node is None:
                return name
            if is_size(node):
                if not self._counts_tokens(node):
                    return name
                extra[ROWS] = None
                if by_name[name].target == "aten.sym_size.int":
                    return emit(Instruction(_ROWS_COUNT, "aten.sym_size.int", (Ref(ROWS), 0), {}))
                derived = _renamed(by_name[name], on_rows)
                return emit(replace(derived, name=name + _SUFFIX))
            at = self.dimension(node)
            if at is None:
                return name
            extra[ROWS] = None
            return emit(Instruction(name + _SUFFIX, "aten.index_select.default", (Ref(name), at, Ref(ROWS)), {}))

        for step in program.instructions:
            node = self.nodes[step.name]
            if is_size(node) and step.target == "aten.sym_size.int" and self._counts_tokens(node):
                extra[self.positions] = None
                emit(replace(step, args=(Ref(self.positions), 1)))
            else:
                emit(_renamed(step, on_rows) if step.name in self.region else step)
        results = program.results
        if logits in results and logits not in self.region:
            results = tuple(on_rows(r) if r == logits else r for r in results)
        inputs = tuple(dict.fromkeys((*program.inputs, *extra)))
        return _pruned(replace(program, inputs=inputs, results=results, instructions=tuple(written)))

    def _counts_tokens(self, node: fx.Node) -> bool:
        length = self.nodes[self.positions].meta["val"].shape[1].node.expr
        value = node.meta["val"]
        return isinstance(value, torch.SymInt) and length in value.node.expr.free_symbols


def _pruned(program: StageProgram) -> StageProgram:
    """Without instructions that nothing needs; inputs stay."""
    needed = set(program.returns)
    kept: list[Instruction] = []
    for step in reversed(program.instructions):
        if step.name in needed:
            kept.append(step)
            _renamed(step, lambda name: (needed.add(name), name)[1])  # type: ignore[func-returns-value]
    return replace(program, instructions=tuple(reversed(kept)))


def _renamed(step: Instruction, rename: Callable[[str], str]) -> Instruction:
    def walk(a: Any) -> Any:
        if isinstance(a, Ref):
            return Ref(rename(a.name))
        if isinstance(a, list | tuple):
            return type(a)(walk(x) for x in a)
        return a

    return replace(step, args=walk(step.args), kwargs={k: walk(v) for k, v in step.kwargs.items()})
