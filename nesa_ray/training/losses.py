"""Losses: functions of the module's results and of the targets, at the stage that holds the results."""

import time
from collections.abc import Mapping, Sequence

import torch

Values = Mapping[str, torch.Tensor]


def next_token(results: Values, targets: Values) -> torch.Tensor:
    """Mean cross-entropy, nats per token: logits [B, T, V] (the only result) against `labels` int64 [B, T]."""
    (logits_BTV,) = results.values()
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets["labels"].flatten())


def next_token_seconds(shape: Sequence[int], dtype: torch.dtype, device: str, repeats: int = 7) -> float:
    """Least seconds of the loss of logits [B, T, V] and its gradient, on this process's device."""
    logits = torch.randn(tuple(shape), dtype=dtype, device=device, requires_grad=True)
    labels = torch.zeros(tuple(shape[:2]), dtype=torch.int64, device=device)
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        next_token({"logits": logits}, {"labels": labels}).backward()
        if logits.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
        logits.grad = None
    return min(found)
