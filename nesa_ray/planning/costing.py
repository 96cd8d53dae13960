"""What a captured graph costs per micro-batch, in training or in inference: the one place that decides it.

A captured graph knows flops, parameter, output and saved bytes of one forward micro-batch.  Training adds the backward
pass (twice the forward's flops: a gradient for the inputs and one for the parameters), the gradient of each output on
its way back, and what the optimizer keeps; frozen parameters have no gradient and no optimizer.  A graph that states
its costs (any compute_s, or backward nodes) is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nesa_ray.errors import InvalidInput
from nesa_ray.graph.graph import Graph, Node, NodeId

MODES = ("inference", "training")
TRAINING_FLOPS = 3.0
TRAINING_OUTPUT_BYTES = 2.0
RECOMPUTE_FLOPS = 4.0


def states_its_costs(graph: Graph) -> bool:
    """The graph has measured times or its own backward pass."""
    return any(n.compute_s or n.backward for n in graph.nodes)


def derive_costs(
    graph: Graph, mode: str, *, replicas: int = 1, zero: int = 0, in_flight: int = 1, recompute: bool = False,
    cache_tokens: int = 0, mixed_precision: bool = False, local_steps: int = 1,
    seconds: Mapping[NodeId, Mapping[str, float]] | None = None,
) -> Graph:  # fmt: skip
    """The graph with the costs of `mode`.  Pure; ids and edges are kept.

    Training: flops × 3 (2 where the parameters are frozen), output_bytes × 2, and memory_bytes = param_bytes ×
    optimizer_factor (what ZeRO stage `zero` over `replicas` holds; 1 × where frozen) + saved_bytes of `in_flight`
    micro-batches.  Inference: memory_bytes = param_bytes + cache_bytes of `cache_tokens` tokens.
    `recompute` (Chen et al., arXiv 1604.06174) runs the forward pass again before the backward: flops × 4, and the
    saved_bytes of one micro-batch only.  A node that states memory_bytes keeps it.
    With `mixed_precision` the parameters are 16-bit copies of fp32 ones, which the optimizer's state goes with.
    `seconds` are measured times by node and kind of device (graph/measure.py), in place of flops: a training pass, or
    a forward pass, of one micro-batch.
    Raises InvalidInput for an unknown mode or ZeRO stage.
    """
    if mode not in MODES:
        raise InvalidInput(f"mode: needs one of {', '.join(MODES)}, got {mode!r}")
    per_param_byte = optimizer_factor(zero, replicas, local_steps)
    if mixed_precision:
        per_param_byte = 2 * per_param_byte + 1
    if states_its_costs(graph):
        return graph
    passes = RECOMPUTE_FLOPS if recompute else TRAINING_FLOPS

    def measured(node: Node, times: float) -> dict[str, float]:
        return {kind: times * s for kind, s in (seconds or {}).get(node.id, {}).items()}

    held = 1 if recompute else in_flight

    def cost(node: Node) -> Node:
        if mode == "inference":
            held_bytes = node.param_bytes + cache_tokens * node.cache_bytes
            return replace(node, compute_s=measured(node, 1.0), memory_bytes=node.memory_bytes or held_bytes)
        flops = passes - 1 + (node.trained_bytes / node.param_bytes if node.param_bytes else 1.0)
        held_bytes = node.param_bytes + (per_param_byte - 1) * node.trained_bytes + held * node.saved_bytes
        return replace(
            node,
            compute_s=measured(node, passes / TRAINING_FLOPS),
            flops=flops * node.flops,
            access_bytes=flops * node.access_bytes,
            output_bytes=TRAINING_OUTPUT_BYTES * node.output_bytes,
            memory_bytes=node.memory_bytes or held_bytes,
        )

    return graph.with_nodes(cost(n) for n in graph.nodes)


def reduction_factor(zero: int, replicas: int, micro_batches: int, local_steps: int = 1) -> float:
    """Bytes a replica moves per parameter byte and micro-batch, to keep `replicas` together.

    A ring all-reduce of the gradients, 2 (n - 1) / n of their bytes, once a step (Patarasuk and Yuan 2009).  ZeRO moves
    the same: a reduce-scatter, and a gather of the parameters, after the step (1, 2) or before it (3).  With local
    steps (runtime/local_steps.py) a byte for every fp32 parameter goes to each other replica, once in so many.
    """
    if zero not in (0, 1, 2, 3):
        raise InvalidInput(f"zero: needs 0, 1, 2 or 3, got {zero}")
    if local_steps > 1:
        return (replicas - 1) / 4.0 / local_steps / micro_batches
    return 2.0 * (replicas - 1) / replicas / micro_batches


def optimizer_factor(zero: int, replicas: int, local_steps: int = 1) -> float:
    """Most bytes held in a step for each byte of fp32 parameters: parameters, gradients, and what the optimizer keeps.

    The micro-batches' gradients add up whole, and are reduced once.  Adam keeps two moments; ZeRO 1 and 2 (Rajbhandari
    et al., arXiv 1910.02054; as DeepSpeed does them) shard them together with a copy of the parameters; ZeRO 3 shards
    the parameters (twice) and the gradients as well, and gathers the parameters for the step.  Local steps keep what
    was agreed on and its momentum besides.
    """
    if zero not in (0, 1, 2, 3):
        raise InvalidInput(f"zero: needs 0, 1, 2 or 3, got {zero}")
    if zero == 0 or replicas == 1:
        return 6.0 if local_steps > 1 and replicas > 1 else 4.0
    return 2.0 + (5.0 if zero == 3 else 3.0) / replicas
