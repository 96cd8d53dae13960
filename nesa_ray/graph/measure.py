"""Seconds of each operator, timed on the device where the planner should not trust flops and bytes.

The operators are timed where they stand: the program is cut into runs (a transformer layer, a block, what lies
between), each distinct run is executed as a stage would execute it, and its time is shared out among its operators by
clock readings between them; for the backward, readings are taken as the autograd engine reaches each operator.  Runs
that are the same but for names (layer 1, layer 2, …) are timed once, and remembered on disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nesa_ray.errors import CaptureError, InvalidConfig
from nesa_ray.graph.allocator import keep_freed_memory
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.cost import shape, tensors
from nesa_ray.graph.graph import NodeId
from nesa_ray.graph.split import STATE, Ref, StageModule, StageProgram, split
from nesa_ray.products import ONEDNN

MODES = ("inference", "training")
LONGEST_RUN, SHORT_RUN = 64, 12  # operators
KEPT_BYTES = 1 << 20  # of a tensor whose values are kept: masks, statistics
REPEATS, LEAST_S = 5, 0.5  # a run is timed this often, and for so long


@dataclass(frozen=True)
class Part:
    """A run of operators to be timed; plain data, so that it can be timed elsewhere.

    arguments  what it reads, on the meta device where the values don't matter
    state      its parameters and buffers, likewise
    """

    program: StageProgram
    arguments: tuple[torch.Tensor, ...]
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """All that has to be timed for a model: distinct parts by signature, and the node ids of each use of one."""

    parts: Mapping[str, Part]
    uses: tuple[tuple[str, tuple[NodeId | None, ...]], ...]

    @classmethod
    def of(cls, captured: Captured) -> Work:
        """What there is to time of a captured model."""
        values = _values(captured)
        parts: dict[str, Part] = {}
        uses = []
        for program in split(captured, _runs(captured)):
            key = _signature(program, captured, values)
            uses.append((key, tuple(captured.node_id.get(i.name) for i in program.instructions)))
            if key in parts:
                continue
            program = replace(program, state=(*program.state, *program.borrows), borrows={})
            parts[key] = Part(
                replace(program, trainable=captured.trainable & set(program.state)),
                tuple(_plain(values[a]) for a in program.arguments),
                {n: _plain(captured.state[n]) for n in program.state},
            )
        return cls(parts, tuple(uses))


def measure(
    captured: Captured | Work,
    *,
    mode: str,
    device: str = "cpu",
    threads: int = 1,
    cache: Path | None = None,
    beside: int = 0,
) -> dict[NodeId, dict[str, float]]:
    """Seconds of each node on the device, under its kind ("cpu" or "gpu"): what partition takes as `seconds`.

    mode "inference" times the forward pass of one micro-batch at the captured shapes, "training" the forward and the
    backward.  Weights and activations are random: none are needed.  `cache` is a directory for what was measured, by
    operators, shapes, dtypes, device, threads, and how many others work `beside` it on this machine.  The times are
    those of a process that keeps freed memory (allocator.py), as this one does from now on.  Raises InvalidConfig for
    an unknown mode or a device that isn't there.
    """
    place = _place(mode, device)
    work = captured if isinstance(captured, Work) else Work.of(captured)
    kind = "gpu" if place.type == "cuda" else "cpu"
    conditions = {"threads": threads, "beside": beside, "torch": torch.__version__, "onednn": ONEDNN, "mode": mode}
    store = _Store(cache, " ".join([_device_name(place), *(f"{k}={v}" for k, v in conditions.items())]))
    keep_freed_memory()
    with _threads(threads):
        for key, part in work.parts.items():
            if store.get(key) is None:
                store.put(key, _time(part, place, training=mode == "training"))
    return {
        node: {kind: s}
        for key, nodes in work.uses
        for node, s in zip(nodes, store.get(key) or (), strict=True)
        if node is not None
    }


def pace(work: Work, *, mode: str, device: str = "cpu", threads: int = 1, seconds: float = 3.0) -> float:
    """Seconds of a pass of the model's most frequent part, by the wall: a quarter of the passes were as quick.

    What devices can be compared by: whoever else uses a device makes it slower.  Takes `seconds`, and three passes at
    least.  Raises as measure does.
    """
    place = _place(mode, device)
    uses = Counter(key for key, _ in work.uses)
    part = work.parts[max(uses, key=lambda key: uses[key] * len(work.parts[key].program.instructions))]
    keep_freed_memory()
    passes: list[float] = []
    with _threads(threads):
        run = _Run.of(part, place, training=mode == "training")
        run.whole()
        began = time.perf_counter()
        while len(passes) < 3 or time.perf_counter() - began < seconds:
            passes.append(run.whole(wall=True))
    return sorted(passes)[len(passes) // 4]


def _place(mode: str, device: str) -> torch.device:
    if mode not in MODES:
        raise InvalidConfig(f"mode: needs one of {', '.join(MODES)}, got {mode!r}")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig(f"device: {device} isn't there")
    return place


def _runs(captured: Captured) -> dict[Any, int]:
    """Node id -> its run: neighbours in the program's order inside the same numbered module (layers.3).

    Short ones in a row become one: operators timed among few others find their memory warmer than it will be.
    """
    pieces: list[tuple[str, list[int]]] = []
    for n in captured.program.nodes:
        if n.name in captured.node_id:
            where = _numbered(n.meta.get("nn_module_stack") or {})
            if not pieces or pieces[-1][0] != where or len(pieces[-1][1]) >= LONGEST_RUN:
                pieces.append((where, []))
            pieces[-1][1].append(captured.node_id[n.name])
    runs: list[list[int]] = []
    short = False
    for _, nodes in pieces:
        if short and len(nodes) < SHORT_RUN and len(runs[-1]) + len(nodes) <= SHORT_RUN:
            runs[-1] += nodes
        else:
            runs.append(nodes)
            short = len(nodes) < SHORT_RUN
    run_of: dict[Any, int] = {}
    together: dict[Any, int] = {}
    for run, nodes in enumerate(runs):
        for node in nodes:
            shared = captured.graph.node[node].colocate
            run_of[node] = run if shared is None else together.setdefault(shared, run)
    return run_of if _acyclic(captured, run_of) else dict.fromkeys(run_of, 0)


def _acyclic(captured: Captured, run_of: Mapping[Any, int]) -> bool:
    return all(run_of[u] <= run_of[v] for u, v in captured.graph.edges)


def _numbered(stack: Mapping[str, Any]) -> str:
    """The path of the outermost module whose name is a number, as list items' are; "" outside of any."""
    for path, _ in stack.values():
        parts = str(path).split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                return ".".join(parts[: i + 1])
    return ""


def _values(captured: Captured) -> dict[str, Any]:
    return {n.name: n.meta.get("val") for n in captured.program.nodes}


def _signature(program: StageProgram, captured: Captured, values: Mapping[str, Any]) -> str:
    """What decides the run's time: its operators and constants, and the shapes of all it reads, without names."""
    names: dict[str, str] = {}

    def plain(x: Any) -> Any:
        if isinstance(x, Ref):
            return names.setdefault(x.name, f"#{len(names)}")
        if isinstance(x, Mapping):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [plain(v) for v in x]
        return repr(x)

    steps = []
    for i in program.instructions:
        reads = [plain(i.args), plain(i.kwargs)]
        made = [[list(shape(t)), str(t.dtype)] for t in tensors(values[i.name])]
        steps.append([plain(Ref(i.name)), i.target, reads, made])
    given = [
        [names.get(a), [[list(shape(t)), str(t.dtype)] for t in tensors(values[a])], a in program.differentiable]
        for a in program.arguments
    ]
    state = [
        [names.get(f"{STATE}{s}"), list(captured.state[s].shape), str(captured.state[s].dtype), s in captured.trainable]
        for s in (*program.state, *program.borrows)
    ]
    ends = [names.get(r) for r in program.returns]
    return hashlib.sha256(json.dumps([steps, given, state, ends], sort_keys=True).encode()).hexdigest()[:32]


def _time(part: Part, device: torch.device, *, training: bool) -> list[float]:
    """Seconds of each instruction: the least of several passes, less what reading the clock costs."""
    run = _Run.of(part, device, training=training)
    run.whole()
    run.parts()
    whole: list[float] = []
    parts: list[list[float]] = []
    began = time.perf_counter()
    while len(whole) < REPEATS or (time.perf_counter() - began < LEAST_S and len(whole) < 10 * REPEATS):
        whole.append(run.whole())
        parts.append(run.parts())
    least = [
        min(column) for column in zip(*parts, strict=True)
    ]  # how the time is shared: what was disturbed doesn't tell
    return [s * statistics.median(whole) / sum(least) for s in least]


@dataclass
class _Run:
    """One run of operators, executed as a stage executes it."""

    stage: StageModule
    program: StageProgram
    weights: Mapping[str, torch.Tensor]
    arguments: Sequence[torch.Tensor]
    training: bool
    device: torch.device

    def __post_init__(self) -> None:
        self._marked = self.stage.marked()

    @classmethod
    def of(cls, part: Part, device: torch.device, *, training: bool) -> _Run:
        """With random weights and arguments."""
        generator = torch.Generator().manual_seed(0)
        state = {n: _some(t, generator) for n, t in part.state.items()}
        stage = StageModule(part.program, state, device=device)
        weights = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
        arguments = [_some(a, generator).to(device) for a in part.arguments]
        return cls(stage, part.program, weights, arguments, training, device)

    def whole(self, *, wall: bool = False) -> float:
        """Seconds of the forward (and backward), without clock readings in between; by the wall, if asked for."""
        given = self._given()
        with torch.set_grad_enabled(self.training):
            start = self._now(wall)
            made = self.stage.run(self.weights, *given, seed=1 if self.training else None)
            gradients = self._gradients(made)
            seconds = self._now(wall) - start
            if gradients:
                start = self._now(wall)
                torch.autograd.backward([made[i] for i in gradients], list(gradients.values()))
                seconds += self._now(wall) - start
        return seconds

    def parts(self) -> list[float]:
        """Seconds of each instruction, forward and backward together."""
        given = self._given()
        forward: list[float] = []
        reached: list[tuple[int, float]] = []

        def mark(i: int, value: Any) -> None:
            forward.append(self._now())
            node = next((t.grad_fn for t in tensors(value) if t.grad_fn is not None), None)
            if self.training and node is not None:
                node.register_prehook(lambda g: reached.append((i, self._now())))

        with torch.set_grad_enabled(self.training):
            start = self._now()
            made = self._marked(mark, self.weights, *given, seed=1 if self.training else None)
            seconds = [b - a for a, b in zip([start, *forward[:-1]], forward, strict=True)]
            gradients = self._gradients(made)
            if gradients:
                torch.autograd.backward([made[i] for i in gradients], list(gradients.values()))
                after = [t for _, t in reached[1:]] + [self._now()]
                for (i, t), end in zip(reached, after, strict=True):
                    seconds[i] += end - t
        return seconds

    def _given(self) -> list[torch.Tensor]:
        names = self.program.arguments
        flows = self.program.differentiable if self.training else frozenset()
        return [a.detach().requires_grad_() if n in flows else a for n, a in zip(names, self.arguments, strict=True)]

    def _gradients(self, made: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        if not self.training:
            return {}
        return {i: torch.ones_like(t) for i, t in enumerate(made) if t.requires_grad and t.grad_fn is not None}

    def _now(self, wall: bool = False) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif torch.get_num_threads() == 1 and not wall:
            return time.thread_time()  # the autograd engine works in this thread; others' work doesn't count
        return time.perf_counter()


def _plain(like: Any) -> torch.Tensor:
    """The tensor where it is small and has values, else one of its shape and dtype on the meta device."""
    if not isinstance(like, torch.Tensor):
        raise CaptureError(f"measure: a stage reads {type(like).__name__}, which isn't a tensor")
    fake = isinstance(like, torch._subclasses.FakeTensor)
    if not fake and like.device.type != "meta" and like.nbytes <= KEPT_BYTES:
        return like.detach()
    return torch.empty(shape(like), dtype=like.dtype, device="meta")


def _some(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tensor of that shape and dtype; its own values where it has them."""
    if not like.is_meta:
        return like.clone()
    size = tuple(like.shape)
    if like.is_floating_point():
        return (torch.randn(size, generator=generator) / math.sqrt(max(size[-1:] or (1,)))).to(like.dtype)
    return torch.ones(size, dtype=like.dtype) if like.dtype is torch.bool else torch.zeros(size, dtype=like.dtype)


class _Store:
    """What was measured, a file for each run; forgets when there is no directory."""

    def __init__(self, directory: Path | None, conditions: str) -> None:
        self._directory, self._conditions = directory, conditions
        self._kept: dict[str, list[float]] = {}

    def _file(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / (hashlib.sha256(f"{self._conditions} {key}".encode()).hexdigest()[:32] + ".json")

    def get(self, key: str) -> list[float] | None:
        if self._directory is None:
            return self._kept.get(key)
        try:
            return json.loads(self._file(key).read_text())["seconds"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, seconds: list[float]) -> None:
        if self._directory is None:
            self._kept[key] = seconds
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._file(key)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({"conditions": self._conditions, "seconds": seconds}))
        written.replace(file)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
    except OSError:
        models = []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
