"""Means over a stage's replicas, as they are or in a quarter of the bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nesa_ray.errors import StageFailed

RAW = "raw"


class Mean:
    """Averages flat float32 tensors over the default torch.distributed world; all replicas call it in the same order.

    codec     raw: a ring all-reduce.  int8 (codec.py): every replica sends its bytes to every other
    feedback  what encoding took from a tensor is added to the next of its name (Seide et al., Interspeech 2014)

    With int8 it has a group of its own, over gloo, so that it may be called from a thread beside other collectives.
    `sent_bytes` are this replica's so far.
    """

    def __init__(self, codec: str = RAW, *, feedback: bool = True) -> None:
        self._codec, self._feedback, self._replicas = codec, feedback, dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo") if codec != RAW else None
        self._lost: dict[str, torch.Tensor] = {}
        self.sent_bytes = 0

    def __call__(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        """The mean of `flat` [N], the same bits on every replica; `flat` may be changed.  Raises StageFailed."""
        if self._codec == RAW:
            self.sent_bytes += 2 * flat.nbytes * (self._replicas - 1) // self._replicas
            dist.all_reduce(flat)
            return flat.div_(self._replicas)
        from nesa_ray.runtime.codec import FLOAT_CODECS

        codec, device = FLOAT_CODECS[self._codec], flat.device
        flat = flat.cpu()
        if name in self._lost:
            flat = flat.add_(self._lost.pop(name))
        if codec.n_bytes(flat.numel()) >= flat.nbytes:
            self.sent_bytes += 2 * flat.nbytes * (self._replicas - 1) // self._replicas
            dist.all_reduce(flat, group=self._group)
            return flat.div_(self._replicas).to(device)
        payload = codec.encode(flat)
        if payload is None:
            raise StageFailed(f"{name}: has values that aren't finite, and can't be averaged over the replicas")
        everyone = [torch.empty(payload.nbytes, dtype=torch.uint8) for _ in range(self._replicas)]
        dist.all_gather(everyone, torch.from_numpy(payload), group=self._group)
        self.sent_bytes += payload.nbytes * (self._replicas - 1)
        total, part = torch.zeros_like(flat), torch.empty_like(flat)
        for rank, received in enumerate(everyone):
            codec.decode(received.numpy(), part)
            total += part
            if self._feedback and rank == dist.get_rank():
                self._lost[name] = flat - part
        return total.div_(self._replicas).to(device)
