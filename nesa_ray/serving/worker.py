"""A stage's worker: a loop on a thread of its own that computes the stage's part of whatever the engine numbers.

A stage gets each step's message from the engine and activations from the stages before, all under the step's index, so
it needs no other coordination: steps are computed in the order in which the engine numbered them.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nesa_ray.errors import RuntimeFailure
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.split import StageProgram
from nesa_ray.planning.plan import Plan
from nesa_ray.runtime.channel import Channel, Kind, Tag
from nesa_ray.runtime.checkpoint import load_state
from nesa_ray.runtime.stage_actor import StageContext

ENGINE = "engine"
STEP, FAILED_STAGE = "step", "failed"


class Worker:
    """Computes its stage's part of every step.  A kind of worker says how in `_compute`, and `_working` when."""

    def __init__(self, channel: Channel, stage: int) -> None:
        self._channel, self._stage = channel, stage
        self._steps, self._busy_s, self._started = 0, 0.0, time.monotonic()
        self._thread: threading.Thread | None = None

    def _compute(self, index: int, message: torch.Tensor) -> None:
        """One step.  What it raises ends the worker, and the engine is told."""
        raise NotImplementedError

    def start(self) -> None:
        """Begins to serve steps."""
        self._thread = threading.Thread(target=self._run, name=f"stage-{self._stage}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits until the worker has ended, as the engine asks by a step without a message; whether it has."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def stats(self) -> dict[str, float]:
        """Steps computed, seconds spent on them, seconds since the start."""
        return {"steps": self._steps, "busy_s": self._busy_s, "alive_s": time.monotonic() - self._started}

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Notes the time it takes."""
        began = time.perf_counter()
        yield
        self._busy_s += time.perf_counter() - began

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                for index in itertools.count():
                    message = self._channel.recv(Tag(Kind.CONTROL, STEP, index))
                    if message is None:
                        return
                    self._compute(index, message)
                    self._steps += 1
        except Exception as e:
            said = str(e) if isinstance(e, RuntimeFailure) else f"{type(e).__name__}: {e}"
            text = f"stage {self._stage}: {said}\n{traceback.format_exc()}"
            with contextlib.suppress(Exception):  # the engine may be what was lost, or have closed
                self._channel.send(ENGINE, Tag(Kind.CONTROL, FAILED_STAGE, 0), as_bytes(text))


class Spec(Protocol):
    """All that a stage's worker is made from; plain data, so it travels."""

    @property
    def program(self) -> StageProgram:
        """What the stage computes."""

    def worker(self, channel: Channel, peers: Mapping[int, str], device: torch.device | str = "cpu") -> Worker:
        """Made where the stage runs.  `peers` has each stage's name on the channel.  Raises CheckpointError."""


class Drawn(Protocol):
    """A captured model cut by a plan."""

    @property
    def plan(self) -> Plan:
        """The plan."""

    @property
    def specs(self) -> Sequence[Spec]:
        """One for each of its stages."""


@dataclass(frozen=True, kw_only=True)
class StageWeights:
    """Where a stage's state comes from; plain data, so it travels.

    directory  of safetensors; None: nothing is read
    aliases    other names that a parameter may have there
    values     what isn't read: buffers that no checkpoint has, or all of it
    dtype      floating-point tensors that are read are cast to it; None: they aren't
    """

    directory: str | None
    aliases: Mapping[str, tuple[str, ...]]
    values: Mapping[str, torch.Tensor]
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls,
        captured: Captured,
        program: StageProgram,
        values: Mapping[str, torch.Tensor],
        directory: str | None,
        dtype: torch.dtype | None,
    ) -> StageWeights:
        """A stage's, with those of `values` that are its own; the rest is in `directory`."""
        aliases: dict[str, tuple[str, ...]] = {}
        for other, name in captured.aliases.items():
            if name in program.state:
                aliases[name] = (*aliases.get(name, ()), other)
        mine = {n: values[n] for n in program.state if n in values}
        return cls(directory=directory, aliases=aliases, values=mine, dtype=dtype)

    def load(self, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
        """These tensors of the stage's state on its device: no others are read.  Raises CheckpointError."""
        names = list(names)
        wanted = [n for n in names if n not in self.values]
        read = load_state(self.directory, wanted, aliases=self.aliases, dtype=self.dtype) if self.directory else {}
        kept = {n: self.values[n] for n in names if n in self.values}
        return {n: t.to(device) for n, t in {**read, **kept}.items()}


def serving_stage(context: StageContext, *, spec: Spec, peers: Mapping[int, str]) -> Worker:
    """The worker in a StageActor."""
    worker = spec.worker(context.channel, peers, context.device)
    worker.start()
    return worker


def as_bytes(text: str) -> torch.Tensor:
    """Text as a message."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def from_bytes(message: torch.Tensor) -> str:
    """The text of a message."""
    return message.numpy().tobytes().decode()
