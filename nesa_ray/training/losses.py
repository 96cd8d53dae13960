"""Losses: functions of the module's results and of the targets, at the stage that holds the results."""

from collections.abc import Mapping

import torch

Values = Mapping[str, torch.Tensor]


def next_token(results: Values, targets: Values) -> torch.Tensor:
    """Mean cross-entropy, nats per token: logits [B, T, V] (the only result) against `labels` int64 [B, T]."""
    (logits_BTV,) = results.values()
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets["labels"].flatten())
