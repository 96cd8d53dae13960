"""The predictor: rows in, rows out, over a pipeline of stages that compute several batches at the same time.

A request's life:
  1. `predict` counts its rows, and cuts it into them.
  2. Each row waits until a batch may take it (`_let_in`), and is then batched: by Ray Serve, in an endpoint.
  3. `compute` stacks a batch's rows, fills it up to the captured size, and sends it to the stages that read it.
  4. The final stage sends the outputs; they are cut into rows, and each request gets its own together.
  5. A batch that a stage refuses is computed again row by row, so that only the row which is wrong is told so.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from nesa_ray.cluster.joining import connect
from nesa_ray.cluster.probe import Probes
from nesa_ray.errors import InvalidInput, NesaError, Overloaded, RuntimeFailure, StageFailed
from nesa_ray.runtime.channel import Kind, Tag
from nesa_ray.serving.config import PredictConfig
from nesa_ray.serving.metrics import Described, Metrics, StageLoads
from nesa_ray.serving.predict.blueprint import Blueprint, capture_predicted, draw
from nesa_ray.serving.predict.form import Tensors
from nesa_ray.serving.predict.stage import REFUSED
from nesa_ray.serving.replicas import WHOLE, Share, stage_probes
from nesa_ray.serving.running import FAILED, READY
from nesa_ray.serving.stages import RayStages, Stages, phases, planned
from nesa_ray.serving.worker import FAILED_STAGE, STEP, from_bytes

log = logging.getLogger(__name__)
Row = dict[str, torch.Tensor]  # by input or output, without the dimension of rows
Compute = Callable[["list[Entry]"], Awaitable[Sequence[Row | InvalidInput]]]
Batched = Callable[["Entry"], Awaitable[Row | InvalidInput]]
_GO = torch.zeros(1, dtype=torch.uint8)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
DESCRIBED = Described(
    "nesa_predict_",
    {
        "http_requests": ("HTTP requests answered", ("route", "status")),
        "batches": ("batches computed", ()),
        "rows": ("rows computed", ()),
        "filling_rows": ("rows that batches were filled up with", ()),
        "refused_batches": ("batches that a stage couldn't compute", ()),
    },
    {
        "rows_under_way": ("rows that wait or are computed", ()),
        "batches_under_way": ("batches made up and not answered yet", ()),
        "stage_load": ("share of the time in which a stage computed, since it was last looked at", ("stage",)),
    },
    {
        "batch_s": ("seconds of a batch in the stages", _SECONDS),
        "request_s": ("seconds from a request to its end", _SECONDS),
    },
)


def each_alone(compute: Compute) -> Batched:
    """Every row is a batch by itself."""

    async def row(entry: Entry) -> Row | InvalidInput:
        return (await compute([entry]))[0]

    return row


@dataclass(eq=False, slots=True)
class Entry:
    """A row on its way into a batch: `place` has a result once it may go, `batched` says that it has gone."""

    row: Row
    place: asyncio.Future[None]
    batched: bool = False


@dataclass
class _Batch:
    """A batch in the stages, and what has come back of it."""

    answer: Future[Tensors] = field(default_factory=Future)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)


class Predictor:
    """Serves one model over a pipeline of stages.  `predict` and `compute` are for one event loop; all else is
    thread-safe.
    """

    def __init__(
        self,
        config: PredictConfig,
        *,
        blueprint: Blueprint | None = None,
        stages: Stages | None = None,
        batched: Callable[[Compute], Batched] = each_alone,
    ) -> None:
        """Captures, plans and launches, unless stages that run already are given.

        On the live Ray cluster, or on one of this machine, started where there is none and none is named.  What
        isn't closed is closed when this process ends.
        `batched` makes of `compute`, which takes a batch, a function that takes a row.
        """
        self.config = config
        own = blueprint is None or stages is None
        if blueprint is None or stages is None:
            connect(start=True)
            with stage_probes(config) as probes:
                blueprint, stages = launch(config, probes)
        self.blueprint, self.form = blueprint, blueprint.form
        self._stages, self._channel = stages, stages.channel
        self._in_flight = config.batches_in_flight or len(blueprint.specs) + 1
        self._slots = asyncio.Semaphore(self._in_flight)
        self._waiting: deque[Entry] = deque()
        self._entered = self._made_up = 0  # rows let in and in no batch yet, batches that aren't done
        self._batched = batched(self.compute)
        self._lock = threading.Lock()  # over what follows
        self._rows = self._index = 0
        self._under_way: dict[int, _Batch] = {}
        self._failure: NesaError | None = None
        self._closed = False
        self.metrics = Metrics(config.served_name, DESCRIBED)
        self._loads = StageLoads(len(blueprint.specs))
        self._measuring = threading.Lock()
        self._channel.mailbox.on_message = self._on_message
        threading.Thread(target=self._watch, name="predictor-watch", daemon=True).start()
        if own:
            atexit.register(self.close)

    async def predict(self, inputs: Tensors) -> Tensors:
        """The outputs of a request's rows, by name; `inputs` is what Form.check gives.

        Raises InvalidInput for rows that the model can't compute or that are too many, Overloaded when too many wait,
        RuntimeFailure when the stages have failed.
        """
        began = time.monotonic()
        count = len(next(iter(inputs.values())))
        with self._counted(count):
            rows = [{n: t[i] for n, t in inputs.items()} for i in range(count)]
            done = await asyncio.gather(*(self._row(r) for r in rows))
        self.metrics.observe("request_s", time.monotonic() - began)
        return {o.name: torch.stack([d[o.name] for d in done]) for o in self.form.outputs}

    @contextlib.contextmanager
    def _counted(self, count: int) -> Iterator[None]:
        most = self.config.max_waiting
        if count > most:
            raise InvalidInput(f"inputs: at most {most} rows in a request, got {count}")
        with self._lock:
            self.check_ready()
            if self._rows + count > most:
                raise Overloaded(f"predictor: {self._rows} rows are under way or waiting, of {most} that it takes")
            self._rows += count
        try:
            yield
        finally:
            with self._lock:
                self._rows -= count

    async def _row(self, row: Row) -> Row:
        entry = Entry(row, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._let_in()
        try:
            await entry.place
            done = await self._batched(entry)
        finally:
            if entry.place.done() and not entry.place.cancelled() and not entry.batched:  # given up meanwhile
                self._entered -= 1
                self._let_in()
        if isinstance(done, InvalidInput):
            raise done
        return done

    def _let_in(self) -> None:
        """Serve makes up batches whatever the stages do: while they have enough, rows wait here, for full ones."""
        while self._waiting and self._entered < self.form.batch * (self._in_flight - self._made_up):
            entry = self._waiting.popleft()
            if not entry.place.done():
                entry.place.set_result(None)
                self._entered += 1

    async def compute(self, entries: list[Entry]) -> Sequence[Row | InvalidInput]:
        """A batch's rows, at most the captured number: each's outputs, or what is wrong with it.

        Raises RuntimeFailure when the stages have failed.
        """
        for entry in entries:
            entry.batched = True
        self._entered -= len(entries)
        self._made_up += 1
        try:
            async with self._slots:
                return await self._outputs([e.row for e in entries])
        finally:
            self._made_up -= 1
            self._let_in()

    async def _outputs(self, rows: list[Row]) -> Sequence[Row | InvalidInput]:
        filling = [rows[0]] * (self.form.batch - len(rows))
        batch = {i.name: torch.stack([r[i.name] for r in (*rows, *filling)]) for i in self.form.inputs}
        try:
            outputs = await asyncio.wrap_future(self._send(batch))
        except InvalidInput as e:
            self.metrics.count("refused_batches")
            if len(rows) == 1:
                return [e]
            return [one for row in rows for one in await self._outputs([row])]
        self.metrics.count("batches")
        self.metrics.count("rows", len(rows))
        self.metrics.count("filling_rows", len(filling))
        return [{o.name: outputs[o.node][i] for o in self.form.outputs} for i in range(len(rows))]

    def _send(self, batch: Tensors) -> Future[Tensors]:
        """Hands a whole batch to the stages.  Raises RuntimeFailure."""
        node = {i.node: batch[i.name] for i in self.form.inputs}
        waiting = _Batch()
        with self._lock:
            self.check_ready()
            index, self._index = self._index, self._index + 1
            self._under_way[index] = waiting
        for spec in self.blueprint.specs:
            peer = self._stages.peers[spec.program.id]
            self._channel.send(peer, Tag(Kind.CONTROL, STEP, index), _GO)
            for name in spec.program.inputs:
                self._channel.send(peer, Tag(Kind.INPUT, name, index), node[name])
        return waiting.answer

    def _on_message(self, tag: Tag, message: torch.Tensor | None) -> bool:
        """Called by the channel's threads."""
        if tag.kind == Kind.FORWARD:
            self._receive(tag, message)
        elif tag.kind == Kind.CONTROL and tag.name == REFUSED and message is not None:
            self._end(tag.index, InvalidInput(from_bytes(message)))
        elif tag.kind == Kind.CONTROL and tag.name == FAILED_STAGE and message is not None:
            said = from_bytes(message)
            log.error("%s", said)
            self._fail(StageFailed(said.splitlines()[0]))
        else:
            return False
        return True

    def _receive(self, tag: Tag, value: torch.Tensor | None) -> None:
        with self._lock:
            batch = self._under_way.get(tag.index)
            if batch is None or value is None:  # nothing: the stage that refused it says why
                return
            batch.outputs[tag.name] = value
        if len(batch.outputs) == len({o.node for o in self.form.outputs}):
            self.metrics.observe("batch_s", time.monotonic() - batch.began)
            self._end(tag.index, None)

    def _end(self, index: int, error: NesaError | None) -> None:
        with self._lock:
            batch = self._under_way.pop(index, None)
        if batch is not None and batch.answer.set_running_or_notify_cancel():
            if error is None:
                batch.answer.set_result(batch.outputs)
            else:
                batch.answer.set_exception(error)

    def _fail(self, error: NesaError) -> None:
        with self._lock:
            self._failure = self._failure or error
            left = list(self._under_way)
        for index in left:
            self._end(index, error)

    def _watch(self) -> None:
        """Waits for what never comes, to hear when a peer is lost."""
        try:
            self._channel.recv(Tag(Kind.CONTROL, "never", 0))
        except NesaError as e:
            self._fail(e)

    @property
    def state(self) -> str:
        """See Running."""
        return FAILED if self._failure is not None else READY

    def check_health(self) -> None:
        """See Running."""
        if self._failure is not None:
            raise self._failure

    check_ready = check_health

    def measure(self) -> dict[str, Any]:
        """See Running.  Asks the stages: it may take a while."""
        with self._measuring, contextlib.suppress(NesaError):  # without the stages, the rest still counts
            self._loads.see(self._stages.stats())
        gauges = {"rows_under_way": self._rows, "batches_under_way": len(self._under_way)}
        for name, value in gauges.items():
            self.metrics.set(name, value)
        for spec, load in zip(self.blueprint.specs, self._loads.shares, strict=True):
            self.metrics.set("stage_load", load, stage=str(spec.program.id))
        return {"model": self.config.served_name, "state": self.state, **gauges, "stage_loads": self._loads.shares}

    def close(self) -> None:
        """See Running."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            last = self._index
        atexit.unregister(self.close)
        self._fail(RuntimeFailure("predictor: closed"))
        for peer in self._stages.peers.values():
            with contextlib.suppress(Exception):
                self._channel.send(peer, Tag(Kind.CONTROL, STEP, last), None)
        self._stages.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def launch(config: PredictConfig, probes: Probes, *, share: Share = WHOLE, name: str = "") -> tuple[Blueprint, Stages]:
    """See stages.launch."""
    phase = phases(config)
    captured, topology, plan = planned(config, share, probes, phase, capture_predicted)
    blueprint = draw(config, captured, plan)
    stages = RayStages(blueprint, topology, name=name, probes=probes)
    phase(f"started the stages, for batches of {blueprint.form.batch} rows")
    return blueprint, stages
