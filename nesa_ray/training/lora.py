"""LoRA (Hu et al., arXiv 2106.09685): y = W x + (alpha / rank) B A x; A [rank, I] and B [O, rank] train, W is frozen.

The adapters are added to the module before it is captured, so they are operators and parameters like any others: the
planner places them, ZeRO shards them, checkpoints hold them.  On disk they are as the peft library writes and reads
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import nearest, write_json
from nesa_ray.graph.modes import derive_seed
from nesa_ray.runtime.adapter_files import PREFIX, SETTINGS, TENSORS, A, B


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Adapters on a frozen base.

    rank            of the products B A
    alpha           they are scaled by alpha / rank
    dropout         of the adapters' inputs
    target_modules  names, or last parts of names, of the linear layers that get one; none: all but the output head
    merge           also save the whole model, W + (alpha / rank) B A in place of W
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    merge: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        if self.rank < 1:
            raise InvalidConfig(f"train.lora: rank: needs an integer ≥ 1, got {self.rank}")
        if self.alpha <= 0:
            raise InvalidConfig(f"train.lora: alpha: needs a number > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise InvalidConfig(f"train.lora: dropout: needs a number from 0 to below 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


def add_adapters(module: torch.nn.Module, config: LoraConfig) -> None:
    """Freezes the module's parameters and gives its linear layers adapters: children lora_A and lora_B, and a hook.

    The adapters have their layer's device and dtype, and no values yet: see `initial_values`.  Raises InvalidConfig
    where a target isn't there or isn't a linear layer, and for a base that changes as it runs (batch normalisation).
    """
    for path, child in module.named_modules():
        if getattr(child, "track_running_stats", False):
            raise InvalidConfig(f"train.lora: {path} keeps running statistics, so the base wouldn't stay as it is")
    layers = _targets(module, config)
    if config.merge:
        _refuse_tied(module, layers)
    module.requires_grad_(False)
    for layer in layers.values():
        _add_adapter(layer, config)


def _targets(module: torch.nn.Module, config: LoraConfig) -> dict[str, torch.nn.Linear]:
    """The layers that get an adapter, by name."""
    every = dict(module.named_modules())
    if not config.target_modules:
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if head is None:
            raise InvalidConfig(
                f"train.lora: target_modules: missing, {type(module).__name__} doesn't say which is its output head"
            )
        return {p: m for p, m in every.items() if isinstance(m, torch.nn.Linear) and m is not head}
    found: dict[str, torch.nn.Linear] = {}
    for target in config.target_modules:
        named = {p: m for p, m in every.items() if f".{p}".endswith(f".{target}")}
        if not named:
            known = sorted({p.rpartition(".")[2] for p, m in every.items() if isinstance(m, torch.nn.Linear)})
            raise InvalidConfig(f"train.lora: target_modules: no module is named {target!r}{nearest(target, known)}")
        for path, layer in named.items():
            if not isinstance(layer, torch.nn.Linear):
                raise InvalidConfig(f"train.lora: target_modules: {path} is a {type(layer).__name__}, needs a Linear")
            found[path] = layer
    return found


def _refuse_tied(module: torch.nn.Module, layers: Mapping[str, torch.nn.Linear]) -> None:
    every = list(module.named_parameters(remove_duplicate=False))
    for path, layer in layers.items():
        other = next((n for n, p in every if p is layer.weight and n != f"{path}.weight"), None)
        if other is not None:
            raise InvalidConfig(f"train.lora: merge: {path}.weight is tied to {other}, which would change as well")


def _add_adapter(layer: torch.nn.Linear, config: LoraConfig) -> None:
    like: dict[str, Any] = {"bias": False, "device": layer.weight.device, "dtype": layer.weight.dtype}
    layer.lora_A = torch.nn.Linear(layer.in_features, config.rank, **like)
    layer.lora_B = torch.nn.Linear(config.rank, layer.out_features, **like)
    layer.lora_dropout = torch.nn.Dropout(config.dropout).train(layer.training)
    layer.register_forward_hook(
        lambda layer, args, out: out + layer.lora_B(layer.lora_A(layer.lora_dropout(args[0]))) * config.scale
    )


def initial_values(adapters: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """fp32 values of new adapters, as peft draws them (A uniform by Kaiming's bound, B zero), by the seed and name."""
    values = {}
    for name, like in adapters.items():
        values[name] = torch.zeros(like.shape)
        if name.endswith(A):
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            torch.nn.init.kaiming_uniform_(values[name], a=math.sqrt(5), generator=generator)
    return values


def write_adapter(
    directory: Path, parts: Iterable[Path], config: LoraConfig, *, base: str | None, task: str | None
) -> None:
    """Makes of the stages' files (adapters by the module's names; removed) the directory that peft reads.

    `base` is where the base model lies, `task` peft's name for what it is for.
    """
    tensors: dict[str, torch.Tensor] = {}
    for part in parts:
        tensors |= {PREFIX + n: t for n, t in load_file(part).items()}
        part.unlink()
    layers = sorted({n.removeprefix(PREFIX).removesuffix(f".{A}") for n in tensors if n.endswith(A)})
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.target_modules or {p.rpartition(".")[2] for p in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(directory / SETTINGS, settings)


def merged(base: Mapping[str, torch.Tensor], adapter: Path, config: LoraConfig) -> dict[str, torch.Tensor]:
    """The base's tensors with the products of a saved adapter's directory added, each in the base's dtype."""
    with safe_open(adapter / TENSORS, framework="pt") as file:
        names = set(file.keys())

        def whole(name: str, weight: torch.Tensor) -> torch.Tensor:
            layer = PREFIX + name.removesuffix("weight")
            if layer + A not in names:
                return weight
            product = file.get_tensor(layer + B).float() @ file.get_tensor(layer + A).float()
            return weight + (product * config.scale).to(weight.dtype)

        return {n: whole(n, w) for n, w in base.items()}
