"""ServeConfig: what is served, and how: read from YAML, checked field by field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import Fields, read_yaml

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "int8")
REPLICA = "{replica}"  # in a plan's path: the replica's number
POOLINGS = ("mean", "last", "none")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One served model.

    model              a Hugging Face directory: config.json, safetensors, and a tokenizer if text is to be served
    name               what clients call it; the directory's name if absent
    plan               a plan.json for this model; without it, the live cluster is probed and the model partitioned;
                       of several replicas, one each: "{replica}" in the path becomes 0, 1, …
    cluster            a cluster.json to plan for, instead of a probe
    stages             number of pipeline stages when planning; None: the planner chooses
    prompt_per_output  prompt tokens for each output token, as the planner shall assume
    dtype              of activations, weights and cache; "auto" is the checkpoint's
    weights            "int8": those of matrix products in 8 bit with outlier columns in 16 (see quantised.py), which
                       halves their memory against bfloat16; "auto": in `dtype`
    context            most tokens of a sequence, prompt and output together; None: what the model was made for
    max_sequences      most sequences that are computed at the same time
    max_batch_tokens   most tokens of one step; longer prompts are cut into chunks of it
    max_waiting        most requests that wait for admission; beyond it, requests are refused
    batches_in_flight  steps under way at the same time; None: one per stage
    block_size         tokens of one block of the key-value cache
    cache_bytes        bytes of key-value cache in all stages together; None: enough for max_sequences × context tokens,
                       within half of what the stages' devices have left beside the weights
    prefix_cache       whether requests that start alike share the blocks of their common start
    pooling            how a text's last hidden states become its embedding: "mean", "last", or "none": no embeddings;
                       None: as 1_Pooling/config.json beside the model says, else the mean
    max_tokens         most output tokens of a request that names no limit; None: up to the context
    api_keys           keys, one of which clients must send: a list, "env:NAME", or the path of a file with one a line,
                       read where the application is deployed from; None: whoever reaches the port is let in
    max_body_bytes     largest request
    request_timeout_s  most seconds from a request's first byte to its answer's last
    replicas           pipelines beside each other; each has a share of the devices to itself
    max_replicas       most that Serve may start when there are more requests; None: as many as `replicas`
    target_requests    requests under way in a replica that Serve aims at then; None: max_sequences
    host, port         where `nesa-ray serve` listens
    """

    model: str
    name: str | None = None
    plan: str | None = None
    cluster: str | None = None
    stages: int | None = None
    prompt_per_output: float = 2.0
    dtype: str = "auto"
    weights: str = "auto"
    context: int | None = None
    max_sequences: int = 64
    max_batch_tokens: int = 256
    max_waiting: int = 1024
    batches_in_flight: int | None = None
    block_size: int = 16
    cache_bytes: int | None = None
    prefix_cache: bool = True
    pooling: str | None = None
    max_tokens: int | None = None
    api_keys: tuple[str, ...] | str | None = field(default=None, repr=False)
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    replicas: int = 1
    max_replicas: int | None = None
    target_requests: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        if isinstance(self.api_keys, list):
            object.__setattr__(self, "api_keys", tuple(self.api_keys))
        for f in dataclasses.fields(self):
            _check_type(f.name, str(f.type), getattr(self, f.name))
        if self.dtype not in DTYPES:
            raise InvalidConfig(f"serve: dtype: needs one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.weights not in WEIGHTS:
            raise InvalidConfig(f"serve: weights: needs one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.pooling not in (None, *POOLINGS):
            raise InvalidConfig(f"serve: pooling: needs one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.shares < self.replicas:
            raise InvalidConfig(
                f"serve: max_replicas: needs at least replicas, {self.replicas}, got {self.max_replicas}"
            )
        if self.shares > 1 and self.plan is not None and REPLICA not in self.plan:
            raise InvalidConfig(f"serve: plan: several replicas need a plan each: {REPLICA!r} in the path")
        if not self.request_timeout_s:
            raise InvalidConfig("serve: request_timeout_s: needs a number > 0, got 0")
        if not self.port <= 65535:
            raise InvalidConfig(f"serve: port: needs a number up to 65535, got {self.port}")

    @property
    def shares(self) -> int:
        """Shares that the devices are divided into: as many as there may be replicas."""
        return self.max_replicas or self.replicas

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
        for name in ("model", "plan", "cluster", "api_keys"):
            path = given.get(name)
            if isinstance(path, str) and path and not path.startswith("env:"):
                given[name] = str((Path(base) / Path(path).expanduser()).absolute())
        return cls(**given)

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> ServeConfig:
        """Reads a YAML file; relative paths are taken from its directory; `changes` replace what it says.

        Raises InvalidConfig.
        """
        value = read_yaml(path)
        return cls.from_dict({**value, **changes}, base=Path(path).parent)


def _check_type(name: str, declared: str, value: Any) -> None:
    kind, _, optional = declared.partition(" | ")
    if name == "api_keys":
        _check_keys(value)
        return
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
        raise InvalidConfig(f"serve: {name}: needs {needs}, got {value!r}")


def _check_keys(value: Any) -> None:
    keys = (value,) if isinstance(value, str) else value
    good = (
        isinstance(keys, tuple)
        and keys
        and all(isinstance(k, str) and k.isascii() and k.strip() == k != "" for k in keys)
    )
    if value is not None and not good:
        raise InvalidConfig("serve: api_keys: needs a list of keys, 'env:NAME' or a file's path")
