"""What a replica's first stage does for all of them: loads micro-batches, sends inputs and labels to who reads them.

A step's are sent a step ahead, once its predecessor's last activations have left: the links that carry activations
have nothing to carry then, and the next step's first activations needn't queue behind labels.

Micro-batches are numbered through: those of step s, of M each, from s * M on; held-out ones before 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nesa_ray.training.config import TrainConfig
from nesa_ray.training.data import PackedWindows, TokenBatch, TrainBatches, held_out_batches

Values = Mapping[str, torch.Tensor]


class Feeder:
    """Holds the data of one replica.

    send  sends the values of the micro-batch of that number
    ids   the name of the module's input that takes token ids

    Raises InvalidConfig for data that can't be read or isn't enough.
    """

    def __init__(
        self,
        config: TrainConfig,
        replica: int,
        send: Callable[[int, Values], None],
        *,
        ids: str,
        vocab_size: int,
        eos_token_id: int | None,
    ) -> None:
        self._send, self._ids, self._microbatches = send, ids, config.microbatches
        windows = PackedWindows(config.data, vocab_size=vocab_size, eos_token_id=eos_token_id)
        self._data = TrainBatches(
            windows,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            replica=replica,
            replicas=config.replicas,
        )
        self._samples_seen, self._number = 0, -1
        self._step: list[Values] = []
        self._next: list[Values] = []
        self._held_out: list[Values] = []
        if config.held_out:
            batches = held_out_batches(
                config.held_out, config.data.sequence_length, batch_size=config.micro_batch_size,
                max_windows=config.eval_windows, vocab_size=vocab_size, eos_token_id=eos_token_id,
            )  # fmt: skip
            self._held_out = [self._values(b) for b in batches]

    @property
    def eval_batches(self) -> int:
        """How many micro-batches are held out."""
        return len(self._held_out)

    def begin(self, step: int) -> None:
        """Sees to it that the micro-batches of a step have been sent.  Raises ValueError if it isn't the next one."""
        if not self._next:
            self._load(step)
        elif step != self._number + 1:
            raise ValueError(f"feeder: step {self._number + 1} was sent, step {step} begins")
        self._number, self._step, self._next = step, self._next, []
        self._samples_seen = self._data.samples_seen

    def ahead(self) -> None:
        """Sends the micro-batches of the step after the one that has begun."""
        self._load(self._number + 1)

    def again(self, step: int, count: int) -> None:
        """Sends the first so many micro-batches of the last step again."""
        self._send_all(self._step[:count], step * self._microbatches)

    def held_out(self) -> None:
        """Sends the held-out micro-batches."""
        self._send_all(self._held_out, -len(self._held_out))

    def state_dict(self) -> dict[str, Any]:
        """The data's, as of the last step that has begun: what is sent ahead of it isn't seen yet."""
        return {**self._data.state_dict(), "samples_seen": self._samples_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See TrainBatches."""
        self._data.load_state_dict(state)
        self._samples_seen = self._data.samples_seen

    def _load(self, step: int) -> None:
        self._next = [self._values(b) for b in self._data.next_step()]
        self._send_all(self._next, step * self._microbatches)

    def _send_all(self, batches: list[Values], first: int) -> None:
        for number, values in enumerate(batches, first):
            self._send(number, values)

    def _values(self, batch: TokenBatch) -> Values:
        """The module's inputs (ids; positions where it takes them) and the labels, int64 [B, T] each."""
        shape_BT = batch.input_ids_BT.shape
        return {
            "position_ids": torch.arange(shape_BT[1]).expand(shape_BT),
            "labels": torch.from_numpy(batch.labels_BT),
            self._ids: torch.from_numpy(batch.input_ids_BT),
        }
