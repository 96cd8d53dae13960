"""The engine: requests in, tokens out.  Its loop reads  admit -> batch -> step -> emit.

A request's life:
  1. `submit` checks it and hands it to the loop, with a sink for its output.
  2. It waits until there are a slot and blocks for its prompt (`_admit`).
  3. `_batch` gives its tokens to steps: its prompt in chunks, then one token at a time.
  4. `_step` sends the step to every stage; several steps are under way, so that every stage works.
  5. The last stage samples; the token comes back over the channel and wakes the loop.
  6. `_emit` appends it, turns it into text, and passes it to the sink.
  7. The end is a token, a text, a length, or a cancellation; what it held is free at once.
  8. When the cache is full the youngest idle sequence gives up its blocks and waits again; its tokens stay.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nesa_ray.cluster.joining import connect
from nesa_ray.errors import (
    ContextExceeded,
    InvalidInput,
    NesaError,
    Overloaded,
    RuntimeFailure,
    StageFailed,
    UnknownModel,
)
from nesa_ray.runtime.channel import Kind, Tag
from nesa_ray.serving import scheduler, stage
from nesa_ray.serving.blocks import Blocks
from nesa_ray.serving.blueprint import Blueprint
from nesa_ray.serving.config import ServeConfig
from nesa_ray.serving.metrics import Metrics, StageLoads
from nesa_ray.serving.replicas import stage_probes
from nesa_ray.serving.request import Completion, Piece, Sampling, completion
from nesa_ray.serving.running import DRAINING, FAILED, READY
from nesa_ray.serving.sampling import admission, logprobs_of
from nesa_ray.serving.scheduler import Scheduler, Work
from nesa_ray.serving.segments import RECORDED
from nesa_ray.serving.stages import Stages, launch
from nesa_ray.serving.step import pack_step
from nesa_ray.serving.stream import Stream
from nesa_ray.serving.text import TextStream, load_tokenizer
from nesa_ray.serving.worker import FAILED_STAGE, STEP, as_bytes, from_bytes

log = logging.getLogger(__name__)
Sink = Callable[[Piece | NesaError], None]
CANCELLED = "cancelled"


@dataclass(eq=False, slots=True)
class _Live:
    """A request that the loop knows."""

    sequence: scheduler.Sequence
    sink: Sink
    ends: frozenset[int]
    text: TextStream | None
    began: float = field(default_factory=time.monotonic)
    first_token: float = 0.0


class Engine:
    """Serves one model over a pipeline of stages, and adapters of it by their names.  Thread-safe.

    models   what clients may call: the model, and then its adapters
    """

    def __init__(
        self, config: ServeConfig, *, blueprint: Blueprint | None = None, stages: Stages | None = None
    ) -> None:
        """Captures, plans and launches, unless stages that run already are given.

        On the live Ray cluster, or on one of this machine, started where there is none and none is named.  What
        isn't closed is closed when this process ends.
        """
        self.config = config
        self.models = (config.served_name, *config.adapters)
        self.tokenizer = load_tokenizer(config.model)
        own = blueprint is None or stages is None
        if blueprint is None or stages is None:
            connect(start=True)
            with stage_probes(config) as probes:
                blueprint, stages = launch(config, probes)
        self.blueprint, self._stages, self._channel = blueprint, stages, stages.channel
        self._blocks = Blocks(blueprint.blocks, blueprint.block_size, prefix_cache=config.prefix_cache)
        self.scheduler = Scheduler(
            self._blocks,
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            batches_in_flight=config.batches_in_flight or 1,
            chunk=blueprint.chunk,
        )
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._live: dict[int, _Live] = {}
        self._under_way: dict[int, list[scheduler.Sequence]] = {}
        self._embedded: dict[int, list[scheduler.Sequence]] = {}
        self._admissions: list[scheduler.Sequence] = []
        self._ids, self._step_index = itertools.count(), 0
        self._random = random.Random()
        self._failure: NesaError | None = None
        self._lock = threading.Condition()  # over what follows; told when the count becomes 0
        self._count = 0
        self._closed = self._draining = False
        self.metrics = Metrics(config.served_name)
        self._loads = StageLoads(len(blueprint.specs))
        self._measuring = threading.Lock()
        self._preempted = 0
        self._channel.mailbox.on_message = self._on_message
        threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        if own:
            atexit.register(self.close)
        if config.batches_in_flight is None:
            try:
                self.scheduler.batches_in_flight = self._steps_that_fill()
            except BaseException:
                self.close()
                raise
            self.scheduler.preemptions, self.metrics = 0, Metrics(config.served_name)
        self.scheduler.queued = 1  # so that the first stage needn't wait for the engine

    def _steps_that_fill(self) -> int:
        """How many steps under way keep the slowest stage at work: those that fit into one's way there and back.

        Found by trying, so that links count as they are, and the first request finds everything warm.
        """
        most, stages = self.config.max_sequences, len(self.blueprint.specs)
        if self.blueprint.context < 3:  # no sequence has a second step
            return stages
        self._step_s(1, 1)
        alone_s, tried = self._step_s(1), min(4 * stages, most)
        while True:
            slowest_s = self._step_s(tried)
            filling = int(alone_s / slowest_s)
            if filling < 0.75 * tried or tried == most:  # so many kept it busy
                break
            tried = min(2 * tried, most)
        filling = min(max(filling, stages), most)
        text = "%s: a step takes %.1f ms, the slowest stage %.1f ms of it; up to %d steps are under way"
        log.info(text, self.config.served_name, 1e3 * alone_s, 1e3 * slowest_s, filling)
        return filling

    def _step_s(self, under_way: int, each: int = 2) -> float:
        """Seconds from one step's end to the next one's, with so many under way, each with one sequence's token."""
        self.scheduler.batches_in_flight = under_way
        ends: queue.SimpleQueue[float | NesaError] = queue.SimpleQueue()

        def sink(piece: Piece | NesaError) -> None:
            ends.put(piece if isinstance(piece, NesaError) else time.perf_counter())

        room = min(each + 1, self.blueprint.context - 1)
        for _ in range(under_way):
            self.submit([0], Sampling(max_tokens=room, temperature=0.0, ignore_eos=True), sink)
        at: list[float] = []
        while len(at) < room * under_way:
            end = ends.get()
            if isinstance(end, NesaError):
                raise end
            at.append(end)
        return (at[-1] - at[under_way - 1]) / (len(at) - under_way)

    # -- the loop ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._warm_up()
            while self._failure is None:
                self._admit()
                while work := self._batch():
                    self._step(work)
                self._emit()
        except NesaError as e:
            self._failure = e
        except Exception as e:
            log.exception("the engine's loop failed")
            self._failure = RuntimeFailure(f"engine: {type(e).__name__}: {e}")
        for peer in self._stages.peers.values():
            with contextlib.suppress(Exception):
                self._channel.send(peer, Tag(Kind.CONTROL, STEP, self._step_index), None)
        with self._lock:
            left = list(self._live.values())
            self._live.clear()
            self._count = 0
            self._lock.notify_all()
        while not self._events.empty():
            kind, value = self._events.get()
            left += [value] if kind == "request" else []
        for live in left:
            self.metrics.count("requests", finish=FAILED)
            live.sink(self._failure or RuntimeFailure("engine: closed"))

    def _warm_up(self) -> None:
        """Steps by which the stages learn to play their kernels as one call (segments.py); nobody waits for them."""
        for tokens, count in RECORDED if self.blueprint.context > 1 else ():
            sequences = [
                scheduler.Sequence(-1, [0, 0], 1, Sampling(temperature=0.0), 0, 1, blocks=[0, 0], slot=i, finished=True)
                for i in range(count)
            ]
            self._admissions += sequences
            self._step([Work(s, 0, 1 + (s.slot < tokens - count), samples=True) for s in sequences])

    def _admit(self) -> None:
        self._admissions += self.scheduler.admit()

    def _batch(self) -> list[Work]:
        return self.scheduler.next(len(self._under_way))

    def _step(self, work: list[Work]) -> None:
        index, self._step_index = self._step_index, self._step_index + 1
        alone = len(self.scheduler.running) == 1 and work[0].count == 1  # chunks of one prompt follow each other
        message = pack_step(work, self.blueprint.block_size, alone=alone)
        news = [admission(s) for s in self._admissions if s.slot >= 0]
        for spec in self.blueprint.specs:
            peer = self._stages.peers[spec.program.id]
            if news and spec.samples:
                self._channel.send(peer, Tag(Kind.CONTROL, stage.ADMISSIONS, index), as_bytes(json.dumps(news)))
            self._channel.send(peer, Tag(Kind.CONTROL, STEP, index), message)
        self._admissions = []
        self._under_way[index] = [w.sequence for w in work if w.samples]
        if embedded := [w.sequence for w in work if w.embeds]:
            self._embedded[index] = embedded

    def _emit(self) -> None:
        """Waits for news: requests, cancellations, and the tokens of a step."""
        kind, value = self._events.get()
        while True:
            if kind == "tokens":
                index, result = value
                tokens = 0
                for sequence, row in zip(self._under_way.pop(index), result.tolist(), strict=True):
                    sequence.steps -= 1
                    if not sequence.finished:
                        tokens += 1
                        self._emit_token(self._live[sequence.id], row)
                self.metrics.count("output_tokens", tokens)
            elif kind == "vectors":
                index, vectors_ED = value
                for sequence, vector_D in zip(self._embedded.pop(index), vectors_ED, strict=True):
                    if not sequence.finished:
                        self._emit_embedding(self._live[sequence.id], vector_D)
            elif kind == "request":
                self._live[value.sequence.id] = value
                self.scheduler.add(value.sequence)
            elif kind == "cancel" and value in self._live:
                self._finish(self._live[value], Piece(finish=CANCELLED))
            elif kind == "failure":
                self._failure = value
            if self._events.empty():
                return
            kind, value = self._events.get()

    def _emit_token(self, live: _Live, row: list[float]) -> None:
        sequence, token = live.sequence, int(row[0])
        sequence.tokens.append(token)
        if not live.first_token:
            live.first_token = time.monotonic()
            self.metrics.observe("time_to_first_token_s", live.first_token - live.began)
            self.metrics.count("cached_prompt_tokens", sequence.cached_tokens)
        finish: str | None = None
        stopped_by: str | int | None = None
        if token in live.ends:
            finish, stopped_by = "stop", token
        elif sequence.output_tokens >= sequence.max_tokens:
            finish = "length"
        text = live.text.push(token, last=finish is not None) if live.text else ""
        if live.text and live.text.stopped_by is not None:
            finish, stopped_by = "stop", live.text.stopped_by
        piece = Piece(
            text=text,
            token_ids=(token,),
            logprobs=logprobs_of(row, sequence.sampling.logprobs),
            finish=finish,
            stopped_by=stopped_by,
            cached_tokens=sequence.cached_tokens,
        )
        if finish is not None:
            self._finish(live, piece)
        else:
            self._send(live, piece)

    def _emit_embedding(self, live: _Live, vector_D: torch.Tensor) -> None:
        if self.blueprint.pooling is not None and self.blueprint.pooling.normalise:
            vector_D = torch.nn.functional.normalize(vector_D, dim=0)
        self.metrics.count("cached_prompt_tokens", live.sequence.cached_tokens)
        self._finish(live, Piece(finish="stop", embedding=vector_D))

    def _finish(self, live: _Live, piece: Piece) -> None:
        self.scheduler.remove([live.sequence])
        with self._lock:
            del self._live[live.sequence.id]
            self._count -= 1
            if not self._count:
                self._lock.notify_all()
        now, tokens = time.monotonic(), live.sequence.output_tokens
        self.metrics.count("requests", finish=str(piece.finish))
        self.metrics.observe("request_s", now - live.began)
        if tokens > 1:
            self.metrics.observe("time_per_output_token_s", (now - live.first_token) / (tokens - 1))
        self._send(live, piece)

    def _send(self, live: _Live, piece: Piece) -> None:
        try:
            live.sink(piece)
        except Exception:  # the reader has gone: its event loop is closed
            self._events.put(("cancel", live.sequence.id))

    def _on_message(self, tag: Tag, message: torch.Tensor | None) -> bool:
        """Called by the channel's threads."""
        if tag.kind != Kind.CONTROL or tag.name not in (stage.TOKENS, stage.VECTORS, FAILED_STAGE) or message is None:
            return False
        if tag.name != FAILED_STAGE:
            self._events.put((tag.name, (tag.index, message)))
        else:
            said = from_bytes(message)
            if not self._closed:
                log.error("%s", said)
            self._events.put(("failure", StageFailed(said.splitlines()[0])))
        return True

    def _watch(self) -> None:
        """Waits for what never comes, to hear when a peer is lost."""
        try:
            self._channel.recv(Tag(Kind.CONTROL, "never", 0))
        except NesaError as e:
            self._events.put(("failure", e))

    # -- what callers use ----------------------------------------------------------------------------------------

    def submit(self, prompt: str | Sequence[int], sampling: Sampling, sink: Sink, model: str | None = None) -> int:
        """Queues a request; `sink` gets its pieces, from the engine's thread, and must not block.  Returns its id.

        `model` is one of `models`; None is the first.
        Raises UnknownModel, InvalidInput for a prompt that can't be served, Overloaded when too many wait,
        RuntimeFailure when the engine has failed or is closed.
        """
        adapter = self.check_model(model)
        tokens = self.tokenize(prompt)
        room = self.blueprint.context - len(tokens)
        if room < (not sampling.embed):
            raise self._too_long(len(tokens))
        if sampling.embed and self.blueprint.pooling is None:
            raise InvalidInput(f"model: {self.config.served_name!r} has no embeddings here")
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise InvalidInput(
                f"max_tokens: the context of {self.blueprint.context} tokens has room for {room} after a prompt of "
                f"{len(tokens)}, got {sampling.max_tokens}"
            )
        limit = sampling.max_tokens or self.config.max_tokens
        if sampling.stop and self.tokenizer is None:
            raise InvalidInput("stop: the model has no tokenizer")
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.blueprint.ends)
        sequence = scheduler.Sequence(
            id=next(self._ids),
            tokens=list(tokens),
            prompt_tokens=len(tokens),
            sampling=sampling,
            seed=sampling.seed if sampling.seed is not None else self._random.getrandbits(63),
            max_tokens=min(limit, room) if limit is not None else room,
            pooling=self.blueprint.pooling.mode if sampling.embed and self.blueprint.pooling else None,
            adapter=adapter,
        )
        text = TextStream(self.tokenizer, sampling.stop) if self.tokenizer is not None else None
        most = self.config.max_sequences + self.config.max_waiting
        with self._lock:
            self.check_ready()
            if self._count >= most:
                raise Overloaded(f"engine: {self._count} requests are under way or waiting, the most it takes")
            self._count += 1
            self._events.put(("request", _Live(sequence, sink, ends, text)))
        self.metrics.count("prompt_tokens", len(tokens))
        return sequence.id

    def check_model(self, model: str | None) -> int:
        """The number of the adapter of that name; 0 for the model itself, and for None.  Raises UnknownModel."""
        if model is None:
            return 0
        if model not in self.models:
            known = ", ".join(map(repr, self.models)) + (" is" if len(self.models) == 1 else " are")
            raise UnknownModel(f"model: {model[:200]!r} isn't served here; {known}")
        return self.models.index(model)

    def tokenize(self, prompt: str | Sequence[int], *, special: bool = True) -> list[int]:
        """Token ids of a prompt; `special`: with what the tokenizer puts around a text.  Raises InvalidInput."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidInput("prompt: the model has no tokenizer, needs token ids")
            try:
                tokens = list(self.tokenizer.encode(prompt, add_special_tokens=special))
            except (TypeError, UnicodeError) as e:
                raise InvalidInput(f"prompt: can't be turned into tokens: {e}") from None
        else:
            tokens = list(prompt)
            if len(tokens) > self.blueprint.context:
                raise self._too_long(len(tokens))
            for t in tokens:
                if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < self.blueprint.vocabulary:
                    raise InvalidInput(f"prompt: token ids are from 0 to {self.blueprint.vocabulary - 1}, got {t!r}")
        if not tokens:
            raise InvalidInput("prompt: is empty, needs at least one token")
        return tokens

    def _too_long(self, tokens: int) -> ContextExceeded:
        return ContextExceeded(
            f"prompt: has {tokens} tokens; the context of {self.blueprint.context} tokens must hold it and at least "
            f"one token of output"
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; empty without a tokenizer."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if self.tokenizer is not None else ""

    def token_text(self, token: int) -> str:
        """A token by itself, as log-probabilities name it."""
        return self.tokenizer.decode([token]) if self.tokenizer is not None else f"token_id:{token}"

    def cancel(self, request: int) -> None:
        """Ends a request; its sink gets a last piece that says so.  One that has ended is left alone."""
        self._events.put(("cancel", request))

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling | None = None,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Completion:
        """The whole output; options are Sampling's fields.  Raises what submit raises, and RuntimeFailure."""
        tokens, sampling = self.tokenize(prompt), replace(sampling or Sampling(), **options)
        return completion(len(tokens), self._gather(tokens, sampling, model, timeout_s))

    def embed(
        self, prompt: str | Sequence[int], *, model: str | None = None, timeout_s: float | None = None
    ) -> torch.Tensor:
        """The prompt's embedding, float32 [D], as the configuration's `pooling` makes it.

        Raises what submit raises, and RuntimeFailure.
        """
        (piece,) = self._gather(self.tokenize(prompt), Sampling(embed=True), model, timeout_s)
        assert piece.embedding is not None
        return piece.embedding

    def _gather(self, tokens: list[int], sampling: Sampling, model: str | None, timeout_s: float | None) -> list[Piece]:
        pieces: queue.SimpleQueue[Piece | NesaError] = queue.SimpleQueue()
        request = self.submit(tokens, sampling, pieces.put, model)
        received: list[Piece] = []
        try:
            while not received or received[-1].finish is None:
                piece = pieces.get(timeout=timeout_s)
                if isinstance(piece, NesaError):
                    raise piece
                received.append(piece)
        except BaseException:
            self.cancel(request)
            raise
        return received

    def stream(
        self, prompt: str | Sequence[int], sampling: Sampling | None = None, *, model: str | None = None, **options: Any
    ) -> Stream:
        """The output of a prompt, piece by piece, for an asynchronous caller.  Raises what submit raises, at once."""
        return Stream(self, prompt, replace(sampling or Sampling(), **options), model)

    @property
    def state(self) -> str:
        """See Running."""
        if self._failure is not None or self._closed:
            return FAILED
        return DRAINING if self._draining else READY

    def check_health(self) -> None:
        """Raises the failure that ended the engine, if one did."""
        if self.state == FAILED:
            raise self._failure or RuntimeFailure("engine: closed")

    def check_ready(self) -> None:
        """Raises RuntimeFailure when no more requests are taken."""
        self.check_health()
        if self._draining:
            raise RuntimeFailure("engine: takes no more requests, it is about to be stopped")

    def drain(self, timeout_s: float | None = None) -> bool:
        """Takes no more requests, and waits until those it has have ended; whether they have."""
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._count, timeout_s)

    def stats(self) -> dict[str, Any]:
        """Requests, blocks and each stage's work so far."""
        return {**self._now(), "stages": self._stages.stats()}

    def _now(self) -> dict[str, int]:
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "free_blocks": self._blocks.free,
            "blocks": self._blocks.count,
            "preemptions": self.scheduler.preemptions,
            "steps": self._step_index,
        }

    def measure(self) -> dict[str, Any]:
        """Brings the gauges of `metrics` up to date; the same as plain data.  Asks the stages: it may take a while."""
        now = self._now()
        with self._measuring:
            with contextlib.suppress(NesaError):  # without the stages, the rest still counts
                self._loads.see(self._stages.stats())
            self.metrics.count("preemptions", now["preemptions"] - self._preempted)
            self._preempted = now["preemptions"]
        gauges = {
            "running": now["running"],
            "waiting": now["waiting"],
            "cache_blocks": now["blocks"],
            "cache_blocks_used": now["blocks"] - now["free_blocks"],
        }
        for name, value in gauges.items():
            self.metrics.set(name, value)
        for spec, load in zip(self.blueprint.specs, self._loads.shares, strict=True):
            self.metrics.set("stage_load", load, stage=str(spec.program.id))
        return {
            "model": self.config.served_name,
            "adapters": list(self.config.adapters),
            "state": self.state,
            "context": self.blueprint.context,
            **gauges,
            "output_tokens": int(self.metrics.total("output_tokens")),
            "stage_loads": self._loads.shares,
        }

    def close(self) -> None:
        """Ends all requests and stops the stages.  Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._events.put(("failure", RuntimeFailure("engine: closed")))
        self._thread.join()
        self._stages.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
