"""Weights on disk: safetensors, never pickle.  Reading takes only the tensors that are asked for, from any layout.

A Hugging Face directory has either model.safetensors, or several files and model.safetensors.index.json that says which
tensor is in which.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nesa_ray.errors import CheckpointError
from nesa_ray.fields import write_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_state(
    directory: str | Path,
    names: Iterable[str],
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The named tensors of a Hugging Face directory; the others are not read.

    `aliases` gives other names that a tensor may have on disk (tied weights).  A name may also lack, or have in
    addition, one leading component (the base model's prefix).  Floating-point tensors are cast to `dtype`.
    Raises CheckpointError.
    """
    directory = Path(directory)
    where = tensor_files(directory)
    found: dict[str, str] = {}
    others: list[str] = []
    for name in names:
        key = next((k for k in _candidates(name, (aliases or {}).get(name, ()), where) if k in where), None)
        if key is None:
            others.append(name)
        else:
            found[name] = key
    with contextlib.ExitStack() as files:
        opened: dict[Path, Any] = {}

        def read(key: str) -> torch.Tensor:
            file = where[key]
            try:
                if file not in opened:
                    opened[file] = files.enter_context(safe_open(file, framework="pt"))
                value = opened[file].get_tensor(key)
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"{file}: can't be read: {e}") from None
            return value.to(dtype) if dtype is not None and value.is_floating_point() else value

        state = {name: read(key) for name, key in found.items()}
        return {**state, **_converted(directory, others, where, read)} if others else state


def _converted(
    directory: Path, names: Sequence[str], where: Mapping[str, Path], read: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors that lie on disk under other names, or in pieces."""
    from nesa_ray.graph.models import read_config
    from nesa_ray.runtime.conversion import make, recipes

    if not (directory / "config.json").is_file():
        raise _lacks(directory, names[0])
    known = recipes(directory, frozenset(where))
    config = read_config(directory)
    made: dict[str, torch.Tensor] = {}
    for name in names:
        if name not in made and name in known:
            made |= make(name, known[name], read, config)
        if name not in made:
            raise _lacks(directory, name)
    return {n: made[n] for n in names}


def _lacks(directory: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{directory}: has no tensor {name}, which the model needs")


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> its file, for all tensors of a Hugging Face directory.  Raises CheckpointError."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{index}: isn't an index of safetensors: {e!r}") from None
        return {name: directory / file for name, file in weight_map.items()}
    whole = directory / WHOLE
    if not whole.is_file():
        raise CheckpointError(f"{directory}: needs {WHOLE} or {INDEX}, has neither")
    try:
        with safe_open(whole, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), whole)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{whole}: can't be read: {e}") from None


def _candidates(name: str, aliases: Sequence[str], where: Mapping[str, Path]) -> Iterable[str]:
    yield name
    yield from aliases
    _, _, rest = name.partition(".")
    if rest:
        yield rest
    prefixes = {k.partition(".")[0] for k in where}
    yield from (f"{p}.{name}" for p in sorted(prefixes))


def shard_name(stage: int, stages: int) -> str:
    """The Hugging Face name of one stage's file."""
    return f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def write_index(directory: Path, names: Mapping[str, Sequence[str]]) -> None:
    """Writes model.safetensors.index.json for the files (file name -> tensors in it) that lie in `directory`.

    One file alone becomes model.safetensors.  Raises CheckpointError when a tensor is in two files.
    """
    files = {f: n for f, n in names.items() if n}
    if len(files) == 1:
        (directory / next(iter(files))).rename(directory / WHOLE)
        return
    weight_map: dict[str, str] = {}
    for file, tensors in files.items():
        for t in tensors:
            if t in weight_map:
                raise CheckpointError(f"{directory}: tensor {t} is in {weight_map[t]} and in {file}")
            weight_map[t] = file
    total = sum((directory / f).stat().st_size for f in files)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A directory to write into; it takes `directory`'s place when the block ends without an error, and only then."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
