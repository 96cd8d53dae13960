"""PredictConfig -> Blueprint: the captured model, cut by the plan, and what each stage is to be built from.

Nothing here reads weights or starts anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nesa_ray.errors import InvalidConfig
from nesa_ray.fields import is_function
from nesa_ray.graph.capture import Captured
from nesa_ray.graph.models import capture_ref, is_decoder, read_config
from nesa_ray.graph.split import split
from nesa_ray.planning.plan import Plan
from nesa_ray.runtime.checkpoint import tensor_files
from nesa_ray.serving.blueprint import weight_dtype
from nesa_ray.serving.config import BATCH, PredictConfig
from nesa_ray.serving.predict.form import Form
from nesa_ray.serving.predict.stage import PredictSpec
from nesa_ray.serving.rows import frozen
from nesa_ray.serving.worker import StageWeights

TOKENS = 128
_DEFAULTS: Mapping[str, int] = {"attention_mask": 1, "token_type_ids": 0}  # as transformers fills them in


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """All that is decided before the stages start."""

    plan: Plan
    specs: tuple[PredictSpec, ...]
    form: Form


def capture_predicted(config: PredictConfig) -> Captured:
    """The graph that a plan for this configuration is a plan of, in evaluation mode.

    Raises InvalidConfig where the model is a decoder or the example isn't as the configuration says; CaptureError.
    """
    if is_function(config.model):
        captured = capture_ref(config.model, dtype=_dtype(config), prepare=_evaluating)
        batch = Form.of(captured, {}).batch
        if config.batch_size not in (None, batch):
            raise InvalidConfig(f"serve: batch_size: the example of {config.model} has {batch} rows")
        return captured
    hf = read_config(config.model)
    if is_decoder(hf):
        raise InvalidConfig(f"serve: model: {config.model} is a decoder: serve it by serve_apps.llm")
    longest = getattr(hf, "max_position_embeddings", None) or TOKENS
    return capture_ref(
        config.model,
        batch=config.batch_size or BATCH,
        tokens=config.tokens or min(TOKENS, longest),
        dtype=_dtype(config),
        prepare=_evaluating,
        padded=True,
    )


def _evaluating(module: torch.nn.Module) -> None:
    module.eval()


def _dtype(config: PredictConfig) -> torch.dtype | None:
    """Of the weights; None: as the function made them."""
    return None if is_function(config.model) and config.dtype == "auto" else weight_dtype(config)


def draw(config: PredictConfig, captured: Captured, plan: Plan) -> Blueprint:
    """Cuts the captured model.  Raises InvalidPlan, InvalidConfig or CheckpointError."""
    function = is_function(config.model)
    form = Form.of(captured, {} if function else _DEFAULTS)
    directory = config.weights if function else str(Path(config.model).resolve())
    on_disk = tensor_files(Path(directory)) if directory is not None else {}
    # What a checkpoint may lack: buffers.  Without one, the function's module has it all.
    trained = captured.trainable if directory is not None else frozenset()
    values = {n: t for n, t in captured.state.items() if not t.is_meta and n not in on_disk and n not in trained}
    if directory is None:
        captured.weights()  # raises CheckpointError for what has no value
    programs = [frozen(p) for p in split(captured, plan.stage_of)]
    held = {captured.state[n].dtype for n in captured.trainable}  # training keeps float32 masters
    dtype = _dtype(config) or (held.pop() if len(held) == 1 else None)
    specs = [PredictSpec(program=p, weights=StageWeights.of(captured, p, values, directory, dtype)) for p in programs]
    return Blueprint(plan=plan, specs=tuple(specs), form=form)
