"""ServeConfig -> Blueprint: the captured model, cut by the plan, and what each stage is to be built from.

Nothing here reads weights or starts anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from nesa_ray.cluster.probe import Probes
from nesa_ray.cluster.topology import Topology
from nesa_ray.errors import InvalidConfig
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.models import capture_ref, read_config
from nesa_ray.graph.split import split
from nesa_ray.planning.partition import partition
from nesa_ray.planning.plan import Plan
from nesa_ray.runtime.checkpoint import tensor_files
from nesa_ray.serving import pace
from nesa_ray.serving.adapters import configured, find_sites
from nesa_ray.serving.config import EndpointConfig, ServeConfig
from nesa_ray.serving.kv_cache import HeadShape
from nesa_ray.serving.pace import Pace
from nesa_ray.serving.pooling import Pooling, pooling_of
from nesa_ray.serving.quantised import with_quantised_costs
from nesa_ray.serving.replicas import WHOLE, Share, configured_plan
from nesa_ray.serving.rows import prepare, with_served_costs
from nesa_ray.serving.stage import StageSpec
from nesa_ray.serving.worker import StageWeights

CACHE_SHARE = 0.5  # of what a device has left beside the weights, where the configuration names no cache_bytes
# As the planner is to assume: steps of so many of the sequences, each token sees so much of the longest context.
STEP_SHARE, SEEN_SHARE, MOST_CONTEXT = 0.5, 0.25, 4096
CPU_CHUNK, GPU_CHUNK = 64, 1024
DEFAULT_CONTEXT = 2048  # for a model that doesn't say how long its texts may be
Costs = dict[str, Any]  # partition's arguments by name


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """All that is decided before the stages start.

    context   most tokens of a sequence;  ends  token ids that end an output
    chunk     tokens of prompts in a step from which on they are computed about as fast as in larger ones
    pooling   how embeddings are made; None: not at all
    """

    plan: Plan
    specs: tuple[StageSpec, ...]
    context: int
    chunk: int
    vocabulary: int
    ends: frozenset[int]
    pooling: Pooling | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.specs[0].block_size

    @property
    def blocks(self) -> int:
        """Blocks of every stage's cache."""
        return self.specs[0].blocks

    @property
    def sampler(self) -> StageSpec:
        """The stage that makes the logits."""
        return next(s for s in self.specs if s.samples)


def capture_served(config: ServeConfig) -> Captured:
    """The graph that a plan for this configuration is a plan of."""
    rows = STEP_SHARE * config.max_sequences * (1 + config.prompt_per_output)
    captured = capture_ref(config.model, batch=1, tokens=max(2, round(rows)), dtype=weight_dtype(config))
    if config.weights == "int8":
        captured = with_quantised_costs(captured)
    context = config.context or _longest_context(read_config(config.model))
    return with_served_costs(captured, 1 / (1 + config.prompt_per_output), SEEN_SHARE * min(context, MOST_CONTEXT))


def weight_dtype(config: EndpointConfig) -> torch.dtype:
    """What the cache is in, and weights that aren't int8; "auto" is what the checkpoint says, float32 if nothing."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    declared = getattr(read_config(config.model), "dtype", None) or torch.float32
    return getattr(torch, declared) if isinstance(declared, str) else declared


def survey(config: EndpointConfig, probes: Probes, share: Share = WHOLE) -> Topology:
    """The devices: the configured ones, or the share's of the live cluster, measured for a plan that is to be made."""
    if config.cluster is not None:
        described = Topology.from_json(config.cluster)
        return described if config.plan is not None else share.within(described)
    return probes.present(60.0) if config.plan is not None else probes.measured(60.0)


def plan_for(
    config: EndpointConfig, captured: Captured, topology: Topology, share: Share = WHOLE, costs: Costs | None = None
) -> Plan:
    """The share's configured plan, or one made for `topology` with partition's arguments `costs`."""
    if config.plan is not None:
        return configured_plan(config.plan, share)
    return partition(captured.graph, **{"topology": topology, **(costs or {})}, mode="inference", stages=config.stages)


def served_costs(
    config: ServeConfig, captured: Captured, topology: Topology, measured: Callable[..., dict[str, Pace]] | None = None
) -> Costs:
    """What a plan is made with besides: the devices' pace, and room for the cache.

    measured  gives what a function says on each device; without it, their pace is as the topology states it
    """
    costs: Costs = {"cache_tokens": _planned_cache_tokens(config, captured)}
    if config.plan is not None:
        return costs
    if measured is not None and (shapes := _head_shapes(captured)):
        shape = next(iter(shapes.values()))
        dtype, quantised = weight_dtype(config), config.weights == "int8"
        paces: dict[str, Pace] | None = measured(pace.measure, dtype, quantised, shape, config.block_size)
    else:
        paces = pace.stated(topology)
    if paces is not None:
        costs["seconds"], costs["topology"] = pace.paced(captured.graph, topology, paces)
    return costs


def _planned_cache_tokens(config: ServeConfig, captured: Captured) -> int:
    """Tokens of context that a plan has to leave room for: a sequence at least; more takes what is left."""
    if config.cache_bytes is None:
        return config.context or 0
    per_token = sum(n.cache_bytes for n in captured.graph.nodes)
    return int(config.cache_bytes / max(per_token, 1))


def draw(config: ServeConfig, captured: Captured, plan: Plan, topology: Topology | None = None) -> Blueprint:
    """Cuts the captured model, for the memory of `topology`'s devices, or of this machine without it.

    Raises InvalidPlan, CaptureError, CheckpointError or InvalidConfig.
    """
    hf = read_config(config.model)
    dtype = weight_dtype(config)
    on_disk = tensor_files(Path(config.model))
    served = prepare(captured, split(captured, plan.stage_of))
    shapes = _head_shapes(captured)
    cached = {p.id: [shapes[i.name] for i in p.instructions if i.name in shapes] for p in served.programs}
    bytes_per_token = {s: sum(h.bytes_per_token(dtype) for h in heads) for s, heads in cached.items()}
    adapters = configured(config)
    sites = find_sites(captured, served, adapters)
    adapted = {p.id: {i.name: sites[i.name] for i in p.instructions if i.name in sites} for p in served.programs}
    free_bytes = _free_bytes(captured, plan, topology)
    for stage, of_stage in adapted.items():
        layers = {s.layer for s in of_stage.values()}
        free_bytes[stage] -= dtype.itemsize * sum(a.numbers(n) for a in adapters.values() for n in layers)
    context, blocks = _cache_size(config, hf, bytes_per_token, free_bytes)
    buffers = {n: t for n, t in captured.state.items() if not t.is_meta and n not in on_disk}
    vocabulary = int(_value(captured, captured.outputs[0]).shape[-1])
    quantised = config.weights == "int8"
    readers = tuple(p.id for p in served.programs if any(served.tokens in i.reads for i in p.instructions))
    specs = []
    for program in served.programs:
        own = {i.name for i in program.instructions}
        specs.append(
            StageSpec(
                program=program,
                tokens=served.tokens,
                positions=served.positions,
                logits=served.logits,
                hidden=served.hidden,
                readers=readers,
                weights=StageWeights.of(
                    captured, program, buffers, str(Path(config.model).resolve()), None if quantised else dtype
                ),
                attention={n: s for n, s in shapes.items() if n in own},
                adapters=tuple(adapters.values()),
                adapted=adapted[program.id],
                dtype=dtype,
                quantised=quantised,
                block_size=config.block_size,
                blocks=blocks,
                vocabulary=vocabulary,
                lent=_lent(plan, topology, program.id),
            )
        )
    return Blueprint(
        plan=plan,
        specs=tuple(specs),
        context=context,
        chunk=_chunk(plan, topology),
        vocabulary=vocabulary,
        ends=_ends(config, hf),
        pooling=pooling_of(config.model, config.pooling) if served.hidden is not None else None,
    )


def _lent(plan: Plan, topology: Topology | None, stage: int) -> tuple[int, ...]:
    """The cores of the other stages on its host."""
    known = topology.device if topology is not None else {}
    devices = {s.id: known[s.devices[0]] for s in plan.stages if s.devices[0] in known}
    if stage not in devices:
        return ()
    own = devices[stage]
    others = {c for s, d in devices.items() if s != stage and d.node == own.node for c in d.cores}
    return tuple(sorted(others - set(own.cores)))


def _chunk(plan: Plan, topology: Topology | None) -> int:
    """A core reads a weight while it computes with it for some ten rows, a GPU for some hundreds."""
    devices = topology.device if topology is not None else {}
    on_gpu = any(devices[d].kind != "cpu" for s in plan.stages for d in s.devices if d in devices)
    return GPU_CHUNK if on_gpu else CPU_CHUNK


def _value(captured: Captured, name: str) -> torch.Tensor:
    return next(n for n in captured.program.nodes if n.name == name).meta["val"]


def _head_shapes(captured: Captured) -> dict[str, HeadShape]:
    shapes = {}
    for n in captured.program.nodes:
        if n.target is torch.ops.nesa.attention.default:
            q, k, v = (a.meta["val"] for a in n.args[:3])
            shapes[n.name] = HeadShape(int(q.shape[1]), int(k.shape[1]), int(k.shape[-1]), int(v.shape[-1]))
    return shapes


def _free_bytes(captured: Captured, plan: Plan, topology: Topology | None) -> dict[int, float]:
    """What each stage's device has left beside the stage's weights; of a device whose memory isn't known, infinity."""
    weights = {s.id: sum(captured.graph.node[n].param_bytes for n in s.nodes) for s in plan.stages}
    if topology is None:
        here = psutil.virtual_memory().available - sum(weights.values())
        return {s: here / len(weights) for s in weights}
    devices = topology.device
    known = {s.id: min(devices[d].memory_bytes if d in devices else math.inf for d in s.devices) for s in plan.stages}
    return {s: m - weights[s] for s, m in known.items()}


def _cache_size(
    config: ServeConfig, hf: Any, bytes_per_token: Mapping[int, int], free_bytes: Mapping[int, float]
) -> tuple[int, int]:
    """(context, blocks): the most tokens of a sequence, and the blocks of every stage's cache."""
    longest = _longest_context(hf)
    if config.context is not None and config.context > longest:
        raise InvalidConfig(f"serve: context: the model was made for at most {longest} tokens, got {config.context}")
    context = config.context or longest
    total = sum(bytes_per_token.values())
    if config.cache_bytes is not None:
        tokens = config.cache_bytes / max(total, 1)
    else:
        holding = {s: b for s, b in bytes_per_token.items() if b}
        tokens = min((CACHE_SHARE * max(free_bytes[s], 0.0) / b for s, b in holding.items()), default=math.inf)
    blocks = int(min(config.max_sequences * -(-context // config.block_size), tokens // config.block_size))
    if blocks * config.block_size < context:
        if config.context is not None or blocks < 1:
            raise InvalidConfig(
                f"serve: cache_bytes: a sequence of {context} tokens needs {total * context} bytes in all stages, "
                f"there is room for {int(tokens)} tokens"
            )
        context = blocks * config.block_size
    for stage, per_token in bytes_per_token.items():
        needed = per_token * blocks * config.block_size
        if needed > free_bytes[stage]:
            raise InvalidConfig(
                f"serve: cache_bytes: stage {stage} needs {needed} bytes of cache, its device has "
                f"{int(free_bytes[stage])} left beside the weights"
            )
    return context, blocks


def _longest_context(hf: Any) -> int:
    return int(getattr(hf, "max_position_embeddings", None) or DEFAULT_CONTEXT)


def _ends(config: ServeConfig, hf: Any) -> frozenset[int]:
    file = Path(config.model) / "generation_config.json"
    declared = None
    if file.is_file():
        try:
            declared = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as e:
            raise InvalidConfig(f"model: {file}: not a generation configuration: {e}") from None
    declared = getattr(hf, "eos_token_id", None) if declared is None else declared
    return frozenset([declared] if isinstance(declared, int) else declared or [])
