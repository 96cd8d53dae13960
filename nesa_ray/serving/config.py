"""What is served, and how: read from YAML, checked field by field.

ServeConfig is a decoder's, PredictConfig any other model's; EndpointConfig is what both have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import Fields, is_function, read_yaml

BATCH = 8  # rows of a predictor's batch, where nothing says otherwise
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "int8")
REPLICA = "{replica}"  # in a plan's path: the replica's number
POOLINGS = ("mean", "last", "none")


C = TypeVar("C", bound="EndpointConfig")


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Any endpoint's.

    model              what is served: see ServeConfig, PredictConfig
    name               what clients call it; the directory's name if absent
    plan               a plan.json for this model; without it, the live cluster is probed and the model partitioned;
                       of several replicas, one each: "{replica}" in the path becomes 0, 1, …
    cluster            a cluster.json to plan for, instead of a probe
    stages             number of pipeline stages when planning; None: the planner chooses
    dtype              of the weights, and what is computed in; "auto" is the checkpoint's
    api_keys           keys, one of which clients must send: a list, "env:NAME", or the path of a file with one a line,
                       read where the application is deployed from; None: whoever reaches the port is let in
    max_body_bytes     largest request
    request_timeout_s  most seconds from a request's first byte to its answer's last
    replicas           pipelines beside each other; each has a share of the devices to itself
    max_replicas       most that Serve may start when there are more requests; None: as many as `replicas`
    target_requests    requests under way in a replica that Serve aims at then; None: as many as are computed at once
    host, port         where `nesa-ray serve` and `nesa-ray predict` listen
    """

    model: str
    name: str | None = None
    plan: str | None = None
    cluster: str | None = None
    stages: int | None = None
    dtype: str = "auto"
    api_keys: tuple[str, ...] | str | None = field(default=None, repr=False)
    max_body_bytes: int = 4 << 20
    request_timeout_s: float = 600.0
    replicas: int = 1
    max_replicas: int | None = None
    target_requests: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000

    NEEDED: ClassVar[str] = "a model"  # what `model` has to name
    PATHS: ClassVar[tuple[str, ...]] = ("model", "plan", "cluster", "api_keys")

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        if isinstance(self.api_keys, list):
            object.__setattr__(self, "api_keys", tuple(self.api_keys))
        for f in dataclasses.fields(self):
            _check_type(f.name, str(f.type), getattr(self, f.name))
        if self.dtype not in DTYPES:
            raise InvalidConfig(f"serve: dtype: needs one of {', '.join(DTYPES)}, got {self.dtype!r}")
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
    def from_dict(cls: type[C], value: Any, *, base: str | Path = ".") -> C:
        """Reads a mapping; relative paths are taken from `base`.  Raises InvalidConfig."""
        known = Fields(value, "serve", InvalidConfig)
        known.only(f.name for f in dataclasses.fields(cls))
        if "model" not in known.value:
            raise known.fail("model", f"missing, needs {cls.NEEDED}")
        given = dict(known.value)
        for name in cls.PATHS:
            path = given.get(name)
            if name == "model" and isinstance(path, str) and is_function(path):
                continue
            if isinstance(path, Mapping):
                given[name] = {key: _absolute(one, base) for key, one in path.items()}
            elif name in given:
                given[name] = _absolute(path, base)
        return cls(**given)

    @classmethod
    def from_yaml(cls: type[C], path: str | Path, **changes: Any) -> C:
        """Reads a YAML file; relative paths are taken from its directory; `changes` replace what it says.

        Raises InvalidConfig.
        """
        value = read_yaml(path)
        return cls.from_dict({**value, **changes}, base=Path(path).parent)

    @classmethod
    def from_arguments(cls: type[C], args: Mapping[str, Any]) -> C:
        """What `serve run` and `serve deploy` pass: `config` names a YAML file, other arguments are fields and come
        before the file's.

        `serve run` passes every argument as text, which is read as YAML.  Raises InvalidConfig.
        """
        given = {k: yaml.safe_load(v) if isinstance(v, str) and k != "config" else v for k, v in args.items()}
        file = given.pop("config", None)
        if file is not None and not isinstance(file, str):
            raise InvalidConfig(f"serve: config: needs the path of a YAML file, got {file!r}")
        return cls.from_yaml(file, **given) if file is not None else cls.from_dict(given)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EndpointConfig):
    """One served decoder.

    model              a Hugging Face directory: config.json, safetensors, and a tokenizer if text is to be served
    adapters           name -> directory of a LoRA adapter as peft writes it, used where clients call that name
    prompt_per_output  prompt tokens for each output token, as the planner shall assume
    weights            "int8": those of matrix products in 8 bit with outlier columns in 16 (see quantised.py), which
                       halves their memory against bfloat16; "auto": in `dtype`
    context            most tokens of a sequence, prompt and output together; None: what the model was made for
    max_sequences      most sequences that are computed at the same time
    max_batch_tokens   most tokens of one step; longer prompts are cut into chunks of it
    max_waiting        most requests that wait for admission; beyond it, requests are refused
    batches_in_flight  steps under way at the same time; None: as many as keep the slowest stage at work
    block_size         tokens of one block of the key-value cache
    cache_bytes        bytes of key-value cache in all stages together; None: enough for max_sequences × context tokens,
                       within half of what the stages' devices have left beside the weights
    prefix_cache       whether requests that start alike share the blocks of their common start
    pooling            how a text's last hidden states become its embedding: "mean", "last", or "none": no embeddings;
                       None: as 1_Pooling/config.json beside the model says, else the mean
    max_tokens         most output tokens of a request that names no limit; None: up to the context
    stream_chunks_per_s  most chunks a second that all streamed answers of a replica are sent in, besides each one's
                       first and last; where there would be more, several tokens are in one; None: as many as take
                       about a fortieth of the replica's machine
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    prompt_per_output: float = 2.0
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
    stream_chunks_per_s: float | None = None

    NEEDED: ClassVar[str] = "a Hugging Face model directory"
    PATHS: ClassVar[tuple[str, ...]] = (*EndpointConfig.PATHS, "adapters")

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        super().__post_init__()
        if self.served_name in self.adapters:
            raise InvalidConfig(f"serve: adapters.{self.served_name}: is what the model itself is called")
        if self.weights not in WEIGHTS:
            raise InvalidConfig(f"serve: weights: needs one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.stream_chunks_per_s == 0:
            raise InvalidConfig("serve: stream_chunks_per_s: needs a number > 0, got 0")
        if self.pooling not in (None, *POOLINGS):
            raise InvalidConfig(f"serve: pooling: needs one of {', '.join(POOLINGS)}, got {self.pooling!r}")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(EndpointConfig):
    """One served model that isn't a decoder: a classifier, an encoder, two towers, ….

    model              a Hugging Face directory (config.json, safetensors), or "package.module:function", a function
                       that the cluster's nodes can import and that returns (module, example_args, example_kwargs)
    weights            a directory of safetensors in place of the function's values, as training writes it
    batch_size         rows of a batch as it is captured and computed; None: 8, or as many as the function's example has
    tokens             length of a text, for a Hugging Face model; None: 128, or the most that it was made for
    batch_wait_s       how long a row waits for others, while stages are free, before its batch is filled up
    batches_in_flight  batches under way at the same time; None: one per stage, and one on its way
    max_waiting        most rows that wait or are computed; requests beyond it are refused
    """

    weights: str | None = None
    batch_size: int | None = None
    tokens: int | None = None
    batch_wait_s: float = 0.005
    batches_in_flight: int | None = None
    max_waiting: int = 1024
    max_body_bytes: int = 64 << 20

    NEEDED: ClassVar[str] = "a Hugging Face model directory or package.module:function"
    PATHS: ClassVar[tuple[str, ...]] = (*EndpointConfig.PATHS, "weights")

    def __post_init__(self) -> None:
        """Raises InvalidConfig naming the field."""
        super().__post_init__()
        if self.weights is not None and not is_function(self.model):
            raise InvalidConfig(f"serve: weights: are those of a function's module; {self.model} has its own")


def _absolute(path: Any, base: str | Path) -> Any:
    if not isinstance(path, str) or not path or path.startswith("env:"):
        return path
    return str((Path(base) / Path(path).expanduser()).absolute())


def _check_type(name: str, declared: str, value: Any) -> None:
    kind, _, optional = declared.partition(" | ")
    if name in _CHECKS:
        _CHECKS[name](value)
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


def _check_adapters(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"serve: adapters: needs a mapping of names to directories, got {value!r}")
    for name, directory in value.items():
        if not isinstance(name, str) or not name:
            raise InvalidConfig(f"serve: adapters: needs texts as names, got {name!r}")
        if not isinstance(directory, str) or not directory:
            raise InvalidConfig(f"serve: adapters.{name}: needs a directory, got {directory!r}")


_CHECKS = {"api_keys": _check_keys, "adapters": _check_adapters}
