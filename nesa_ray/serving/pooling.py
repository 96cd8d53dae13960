"""Embeddings: a text's last hidden states, pooled to one vector at the stage that would make the logits.

Shapes: P rows to be pooled, D model width, E texts that are complete.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nesa_ray.errors import InvalidConfig
from nesa_ray.graph.split import STATE, Ref, StageProgram
from nesa_ray.serving.config import POOLINGS

MEAN, LAST, NONE = POOLINGS
_PRODUCTS = {"aten.linear.default": 0, "aten.addmm.default": 1, "aten.mm.default": 0, "aten.matmul.default": 0}


@dataclass(frozen=True)
class Pooling:
    """`mode`: the mean of all tokens' hidden states, or the last token's.  `normalise`: to length 1."""

    mode: str
    normalise: bool = False


def pooling_of(directory: str | Path, mode: str | None) -> Pooling | None:
    """How a model's texts become vectors: by `mode`, or else as sentence-transformers' files beside the model say.

    Without either it is the mean, as it is; None where the mode is "none".  Raises InvalidConfig for files that ask for
    something else.
    """
    modules = _read(Path(directory) / "modules.json") or []
    normalise = any(str(m.get("type", "")).endswith("Normalize") for m in modules)
    declared = _read(Path(directory) / "1_Pooling" / "config.json") or {}
    if mode is None:
        asked = {k for k, v in declared.items() if k.startswith("pooling_mode_") and v is True}
        known = {"pooling_mode_mean_tokens": MEAN, "pooling_mode_lasttoken": LAST}
        if len(asked) > 1 or asked - known.keys():
            raise InvalidConfig(
                f"serve: pooling: the model asks for {', '.join(sorted(asked))}, needs mean or lasttoken"
            )
        mode = known[asked.pop()] if asked else MEAN
    return None if mode == NONE else Pooling(mode, normalise)


def _read(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InvalidConfig(f"model: {file}: not JSON: {e}") from None


def hidden_states(program: StageProgram, logits: str) -> str | None:
    """The value that the head, the last product before the logits, reads; None where the logits aren't of that form."""
    by_name = {s.name: s for s in program.instructions}
    name: str | None = logits
    while name is not None and (step := by_name.get(name)) is not None:
        if step.target in _PRODUCTS:
            given = step.args[_PRODUCTS[step.target]]
            return given.name if isinstance(given, Ref) and not given.name.startswith(STATE) else None
        read = [a.name for a in step.args if isinstance(a, Ref) and not a.name.startswith(STATE)]
        name = read[0] if len(read) == 1 else None
    return None


class Pooler:
    """The sums of the texts under way, by slot."""

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self._counts: dict[int, int] = {}

    def admit(self, slot: int) -> None:
        """A new text has the slot."""
        self._sums.pop(slot, None)
        self._counts.pop(slot, None)

    def add(self, hidden_PD: torch.Tensor, slots_P: torch.Tensor) -> None:
        """Adds rows to their slots' sums, in float32."""
        for slot in slots_P.unique().tolist():
            rows_D = hidden_PD[slots_P == slot].float().sum(0).cpu()
            self._sums[slot] = self._sums[slot] + rows_D if slot in self._sums else rows_D
            self._counts[slot] = self._counts.get(slot, 0) + int((slots_P == slot).sum())

    def take(self, slots_E: torch.Tensor) -> torch.Tensor:
        """The means of the texts in these slots, float32 [E, D]; they are forgotten."""
        return torch.stack([self._sums.pop(s) / self._counts.pop(s) for s in slots_E.tolist()])
