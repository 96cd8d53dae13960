"""Checkpoints whose tensors are named, or cut, otherwise than the module's parameters are (experts one by one, say).

transformers knows how: a list of renamings and conversions for each model, and for the models inside it.  Here they are
applied to the tensors that are asked for only, so that a stage never reads what it doesn't own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Recipe:
    """How a parameter is made from tensors on disk: `keys` by the pattern they matched; no converter: the only one."""

    converter: Any | None
    keys: dict[str, list[str]] = field(default_factory=dict)


@functools.lru_cache(maxsize=2)
def recipes(directory: Path, on_disk: frozenset[str]) -> dict[str, Recipe]:
    """Parameter name -> its recipe, for what transformers would rename or convert; empty where it knows of nothing."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    from nesa_ray.graph.models import empty_model, read_config

    transforms = get_model_conversion_mapping(empty_model(read_config(directory))[0])
    found: dict[str, Recipe] = {}
    for key in sorted(on_disk, key=dot_natural_key):
        name, used, pattern = key, None, ""
        for transform in transforms:
            if used is not None and isinstance(transform, WeightConverter):
                continue
            renamed, matched = transform.rename_source_key(name)
            if matched is None:
                continue
            name = renamed
            if isinstance(transform, WeightConverter):
                used, pattern = transform, matched
        if name != key:
            found.setdefault(name, Recipe(used)).keys.setdefault(pattern, []).append(key)
    return found


def make(name: str, recipe: Recipe, read: Callable[[str], torch.Tensor], config: Any) -> Mapping[str, torch.Tensor]:
    """The parameters that the recipe gives (several where one tensor is cut up), `name` among them."""
    if recipe.converter is None:
        (key,) = recipe.keys[""]
        return {name: read(key)}
    converter = recipe.converter.copy(
        list(recipe.converter._original_source_patterns),
        list(recipe.converter._original_target_patterns),
        operations=recipe.converter.operations,
    )
    for pattern, keys in recipe.keys.items():
        for key in keys:
            converter.add_tensor(name, key, pattern, lambda key=key: read(key))
    made = converter.convert(name, config=config)
    return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
