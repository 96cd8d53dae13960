"""ServeConfig: what is served, and how: read from YAML, checked field by field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import Fields, read_yaml

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One served model.

    model              a Hugging Face directory: config.json, safetensors, and a tokenizer if text is to be served
    name               what clients call it; the directory's name if absent
    plan               a plan.json for this model; without it, the live cluster is probed and the model partitioned
    cluster            a cluster.json to plan for, instead of a probe
    stages             number of pipeline stages when planning; None: the planner chooses
    prompt_per_output  prompt tokens for each output token, as the planner shall assume
    dtype              of weights and cache; "auto" is the checkpoint's
    context            most tokens of a sequence, prompt and output together; None: what the model was made for
    max_sequences      most sequences that are computed at the same time
    max_batch_tokens   most tokens of one step; longer prompts are cut into chunks of it
    max_waiting        most requests that wait for admission; beyond it, requests are refused
    batches_in_flight  steps under way at the same time; None: one per stage
    block_size         tokens of one block of the key-value cache
    cache_bytes        bytes of key-value cache in all stages together; None: enough for max_sequences × context tokens,
                       within half of what the stages' devices have left beside the weights
    prefix_cache       whether requests that start alike share the blocks of their common start
    max_tokens         most output tokens of a request that names no limit; None: up to the context
    host, port         where `nesa-ray serve` listens
    """

    model: str
    name: str | None = None
    plan: str | None = None
    cluster: str | None = None
    stages: int | None = None
    prompt_per_output: float = 2.0
    dtype: str = "auto"
    context: int | None = None
    max_sequences: int = 64
    max_batch_tokens: int = 256
    max_waiting: int = 1024
    batches_in_flight: int | None = None
    block_size: int = 16
    cache_bytes: int | None = None
    prefix_cache: bool = True
    max_tokens: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        for f in dataclasses.fields(self):
            _check_type(f.name, str(f.type), getattr(self, f.name))
        if self.dtype not in DTYPES:
            raise InvalidConfig(f"serve: dtype: needs one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.port <= 65535:
            raise InvalidConfig(f"serve: port: needs a number up to 65535, got {self.port}")

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or Path(self.model).resolve().name

    @classmethod
    def from_dict(cls, value: Any, *, base: str | Path = ".") -> ServeConfig:
        """Reads a mapping; relative paths are taken from `base`.  Raises InvalidConfig."""
        known = Fields(value, "serve", InvalidConfig)
        known.only(f.name for f in dataclasses.fields(cls))
        if "model" not in known.value:
            raise known.fail("model", "missing, needs a Hugging Face model directory")
        given = dict(known.value)
        for field in ("model", "plan", "cluster"):
            if isinstance(given.get(field), str):
                given[field] = str((Path(base) / Path(given[field]).expanduser()).absolute())
        return cls(**given)

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> ServeConfig:
        """Reads a YAML file; relative paths are taken from its directory; `changes` replace what it says.

        Raises InvalidConfig.
        """
        value = read_yaml(path)
        return cls.from_dict({**value, **changes}, base=Path(path).parent)


def _check_type(field: str, declared: str, value: Any) -> None:
    kind, _, optional = declared.partition(" | ")
    if value is None and optional:
        return
    if kind == "int":
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        needs = "an integer ≥ 1"
    elif kind == "float":
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        needs = "a number ≥ 0"
    elif kind == "bool":
        good, needs = isinstance(value, bool), "true or false"
    else:
        good, needs = isinstance(value, str) and bool(value), "a string"
    if not good:
        raise InvalidConfig(f"serve: {field}: needs {needs}, got {value!r}")
