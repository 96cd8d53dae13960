"""The worker of one stage of a model that isn't a decoder: a batch in, its part computed, and on.

A batch that a stage can't compute (an index beyond a table, say) ends there alone: the stages after it are sent that
there is nothing, the predictor why; the next batch is computed as if nothing had been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nesa_ray.graph.split import StageModule, StageProgram
from nesa_ray.runtime.channel import Channel, Kind, Tag
from nesa_ray.serving.worker import ENGINE, StageWeights, Worker, as_bytes

REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class PredictSpec:
    """All that a stage's worker needs; plain data, so it travels."""

    program: StageProgram
    weights: StageWeights

    def worker(self, channel: Channel, peers: Mapping[int, str], device: torch.device | str = "cpu") -> PredictWorker:
        """See worker.Spec."""
        return PredictWorker(channel, self, peers, device)


class PredictWorker(Worker):
    """Holds a stage's weights."""

    def __init__(
        self, channel: Channel, spec: PredictSpec, peers: Mapping[int, str], device: torch.device | str = "cpu"
    ) -> None:
        """Loads the weights: only this stage's own tensors are read.  Raises CheckpointError."""
        super().__init__(channel, spec.program.id)
        self._program, self._peers, self._device = spec.program, peers, torch.device(device)
        state = spec.weights.load(spec.program.state, self._device)
        self._module = StageModule(spec.program, state, device=self._device).requires_grad_(False)

    def _compute(self, index: int, message: torch.Tensor) -> None:
        program = self._program
        received = [self._channel.recv(Tag(Kind.INPUT, name, index)) for name in program.inputs]
        received += [self._channel.recv(Tag(Kind.FORWARD, name, index)) for name in program.receives]
        given = [t for t in received if t is not None]
        with self._working():
            made: Mapping[str, torch.Tensor] = {}
            if len(given) == len(received):
                made = self._made(index, given)
            for name, stages in program.sends.items():
                for stage in stages:
                    self._channel.send(self._peers[stage], Tag(Kind.FORWARD, name, index), made.get(name))
            for name in program.results:
                self._channel.send(ENGINE, Tag(Kind.FORWARD, name, index), made.get(name))

    def _made(self, index: int, given: list[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        try:
            values = self._module(*[t.to(self._device) for t in given])
        except torch.AcceleratorError:  # the device itself is of no use any more
            raise
        except Exception as e:
            said = (str(e).splitlines() or [""])[0]
            text = f"inputs: stage {self._stage} can't compute them: {type(e).__name__}: {said}"
            self._channel.send(ENGINE, Tag(Kind.CONTROL, REFUSED, index), as_bytes(text))
            return {}
        return dict(zip(self._program.returns, values, strict=True))
