"""LoRA adapters on disk (Hu et al., arXiv 2106.09685), as the peft library writes and reads them.

A directory has the settings, and A [rank, I] and B [O, rank] of each layer: W x becomes W x + scale · B A x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nesa_ray.errors import CheckpointError, InvalidConfig
from nesa_ray.fields import Fields, read_json

A, B = "lora_A.weight", "lora_B.weight"
TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what peft puts before the module's own names

# Settings that are used here, or that change nothing once the tensors are there; of others, only those that are off.
_UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_dropout",
    "loftq_config", "eva_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
_OFF: tuple[object, ...] = (None, False, "none", [], {})
_BASE_AS_IT_IS = (None, True, False, "gaussian", "orthogonal", "eva")  # other ways to begin change the base's weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A saved adapter.

    file    has its tensors
    widths  layer, by its name in the module -> (I, O): what A reads, and what B makes
    """

    file: str
    rank: int
    scale: float
    widths: Mapping[str, tuple[int, int]]

    def numbers(self, layer: str) -> int:
        """How many it has for a layer: none where it leaves it alone."""
        return self.rank * sum(self.widths.get(layer, ()))

    def load(
        self, layers: Iterable[str], dtype: torch.dtype, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Layer -> (A, scale · B), of those of `layers` that it has; no other is read.  Raises CheckpointError."""
        try:
            with safe_open(self.file, framework="pt") as file:

                def read(layer: str, part: str, scale: float = 1.0) -> torch.Tensor:
                    value: torch.Tensor = file.get_tensor(f"{PREFIX}{layer}.{part}")
                    return (value.float() * scale).to(device, dtype)

                return {n: (read(n, A), read(n, B, self.scale)) for n in layers if n in self.widths}
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{self.file}: can't be read: {e}") from None


def read_adapter(directory: Path, where: str) -> Adapter:
    """Reads its settings, and names and shapes of its tensors.

    Raises InvalidConfig, beginning with `where`, for what isn't there, doesn't agree, or is more than plain LoRA.
    """
    settings, tensors = directory / SETTINGS, directory / TENSORS
    for file in (settings, tensors):
        if not file.is_file():
            raise InvalidConfig(f"{where}: {directory}: no {file.name} there")
    known = Fields(read_json(settings, InvalidConfig), f"{where}: {settings}", InvalidConfig)
    kind, begun = known.value.get("peft_type"), known.value.get("init_lora_weights")
    if kind != "LORA":
        raise known.fail("peft_type", f"needs LORA, got {kind!r}")
    if begun not in _BASE_AS_IT_IS:
        raise known.fail("init_lora_weights", f"{begun!r} changes the base's weights, which are served as they are")
    for option, value in known.value.items():
        if option not in _UNDERSTOOD and value not in _OFF:
            raise known.fail(option, f"only plain LoRA is served, needs this to be off, got {value!s:.60}")
    rank = int(known.number("r", positive=True))
    alpha = known.number("lora_alpha", positive=True)
    scale = alpha / (math.sqrt(rank) if known.flag("use_rslora") else rank)
    return Adapter(file=str(tensors), rank=rank, scale=scale, widths=_widths(tensors, rank, where))


def _widths(tensors: Path, rank: int, where: str) -> dict[str, tuple[int, int]]:
    try:
        with safe_open(tensors, framework="pt") as file:
            shapes = {n: tuple(file.get_slice(n).get_shape()) for n in sorted(file.keys())}
    except (OSError, SafetensorError) as e:
        raise InvalidConfig(f"{where}: {tensors}: can't be read: {e}") from None
    layers: dict[str, None] = {}
    for name in shapes:
        layer, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if not name.startswith(PREFIX) or f"lora_{part}" not in (A, B):
            raise InvalidConfig(f"{where}: {tensors}: {name} isn't the lora_A or lora_B of a linear layer")
        layers[layer] = None
    if not layers:
        raise InvalidConfig(f"{where}: {tensors}: is empty, needs the lora_A and lora_B of linear layers")
    widths = {}
    for layer in layers:
        a, b = (shapes.get(f"{PREFIX}{layer}.{part}", ()) for part in (A, B))
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise InvalidConfig(
                f"{where}: {tensors}: {layer}: needs lora_A [{rank}, in] and lora_B [out, {rank}], "
                f"has {list(a)} and {list(b)}"
            )
        widths[layer] = (a[1], b[0])
    return widths
