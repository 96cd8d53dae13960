"""Models by reference: a Hugging Face directory or config.json, or `package.module:function`.

Nothing here knows an architecture: transformers builds the module on the meta device, its attention goes through the
one registered operator where the model is a decoder, and torch.export does the rest.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nesa_ray.errors import CaptureError, InvalidConfig
from nesa_ray.fields import is_function
from nesa_ray.garbage import uncollected
from nesa_ray.graph import attention
from nesa_ray.graph.capture import Captured, capture

Prepare = Callable[[torch.nn.Module], None]


@uncollected()
def capture_ref(
    ref: str | Path, *, batch: int = 1, tokens: int = 128, dtype: torch.dtype | None = None,
    prepare: Prepare = lambda module: None, padded: bool = False,
) -> Captured:  # fmt: skip
    """Captures the model that `ref` names, without its weights, at micro-batches of [batch, tokens].

    A Hugging Face decoder takes input_ids and position_ids (int64 [B, T], both dimensions dynamic) and gives logits
    [B, T, V].  A function returns (module, example_args, example_kwargs), and `batch`, `tokens` don't apply.
    `dtype` is of the parameters; `prepare` may change the module before it is captured.  With `padded` an encoder of
    text takes attention_mask besides, and token_type_ids if it tells several kinds of token apart (int64 [B, T]).
    Raises InvalidConfig when there is nothing there, CaptureError when it can't be captured.
    """
    if is_function(ref):
        module, args, kwargs = call_function(str(ref))
        module = module.to(dtype) if dtype else module
        prepare(module)
        return capture(module, args, kwargs)
    config = read_config(ref)
    kwargs, shapes = _example(config, batch, tokens, dtype, padded)
    try:
        captured, buffers = _capture_with(attention.NAME, config, dtype, kwargs, shapes, prepare)
        own = not _attention_nodes(captured)
    except CaptureError:
        own = True
    if own:  # attention that doesn't go through the interface needs the masks that transformers makes for it
        captured, buffers = _capture_with(None, config, dtype, kwargs, shapes, prepare)
    return replace(captured, state={n: buffers.get(n, t) for n, t in captured.state.items()})


def _capture_with(
    implementation: str | None, config: Any, dtype: torch.dtype | None, kwargs: Mapping[str, Any], shapes: Any,
    prepare: Prepare,
) -> tuple[Captured, Mapping[str, torch.Tensor]]:  # fmt: skip
    if implementation and not is_decoder(config):
        raise CaptureError("only a decoder's attention is cut out as one operator")
    module, buffers = empty_model(config, dtype, implementation)
    prepare(module)
    accepted = inspect.signature(module.forward).parameters
    given = {k: v for k, v in kwargs.items() if k in accepted}
    within = shapes and {k: shapes[k] for k in given}
    return capture(module, (), given, dynamic_shapes=within, name=config.model_type), buffers


def _example(
    config: Any, batch: int, tokens: int, dtype: torch.dtype | None, padded: bool
) -> tuple[dict[str, Any], Any]:
    """Keyword arguments on the meta device, and torch.export's dynamic shapes."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    if is_decoder(config):
        # A dimension of one would be captured as a constant: the trace needs two or more where it is dynamic.
        dynamic, static = torch.export.Dim.DYNAMIC, torch.export.Dim.STATIC
        both = {0: dynamic if batch > 1 else static, 1: dynamic if tokens > 1 else static}
        kwargs = {"input_ids": ids, "position_ids": ids.clone(), "use_cache": False}
        return kwargs, {"input_ids": both, "position_ids": both, "use_cache": None}
    given = {"input_ids": ids, **({"attention_mask": ids.clone()} if padded else {})}
    if _auto_class(config) is _family("seq2seq"):
        return {**given, "decoder_input_ids": ids.clone(), "use_cache": False}, None
    if getattr(config, "image_size", None) and not getattr(config, "vocab_size", None):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.zeros(batch, config.num_channels, height, width, dtype=dtype, device="meta")
        return {"pixel_values": pixels}, None
    if padded and getattr(config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = ids.clone()
    return given, None


def _attention_nodes(captured: Captured) -> int:
    return sum(n.target is torch.ops.nesa.attention.default for n in captured.program.nodes)


def is_decoder(config: Any) -> bool:
    """Whether a transformers configuration is a language model's that decodes token by token."""
    return bool(_auto_class(config) is _family("causal"))


def call_function(ref: str) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Calls `package.module:function`; raises InvalidConfig where there is none or it returns something else."""
    module_name, _, function_name = ref.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as e:
        raise InvalidConfig(f"model: {ref!r} isn't a function that can be imported: {e}") from None
    made = function()
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], torch.nn.Module)):
        raise InvalidConfig(f"model: {ref!r} needs to return (module, example_args, example_kwargs)")
    return made[0], tuple(made[1]), dict(made[2])


def read_config(ref: str | Path) -> Any:
    """The transformers configuration in a directory or config.json; raises InvalidConfig."""
    from transformers import AutoConfig

    path = Path(ref)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InvalidConfig(f"model: {ref}: no config.json there")
    try:
        raw = json.loads(file.read_text())
        return AutoConfig.for_model(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise InvalidConfig(f"model: {file}: not a transformers configuration: {str(e).splitlines()[0]}") from None


def empty_model(
    config: Any, dtype: torch.dtype | None = None, implementation: str | None = attention.NAME
) -> tuple[torch.nn.Module, Mapping[str, torch.Tensor]]:
    """The module on the meta device, with that attention where it takes it, and its buffers' real values."""
    attention.register_with_transformers()
    kwargs: dict[str, Any] = {"dtype": dtype} if dtype else {}
    with _parameters_on_meta(), _quiet():
        try:
            chosen = {"attn_implementation": implementation} if implementation else {}
            model = _new(config, **kwargs, **chosen)
        except (ValueError, KeyError) as e:
            if not implementation:
                raise CaptureError(f"model: {config.model_type}: {str(e).splitlines()[0]}") from None
            model = _new(config, **kwargs)
    buffers = {n: b.detach().clone() for n, b in model.named_buffers() if b.device.type != "meta"}
    return model.to("meta"), buffers


def initial_model(config: Any, seed: int, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The module with weights as its authors initialise them, the same for the same seed."""
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        return _new(config, **({"dtype": dtype} if dtype else {}))


def _new(config: Any, **kwargs: Any) -> torch.nn.Module:
    """A module of the class that the configuration names (`architectures`), or else of its model type's."""
    config = copy.deepcopy(config)  # transformers notes its choices in it
    auto = _auto_class(config)
    if auto in (_family("causal"), _family("seq2seq")) or auto.__name__ == "AutoModel":
        return auto.from_config(config, **kwargs)
    return auto._from_config(config, **kwargs)


def _family(name: str) -> Any:
    import transformers

    return {"causal": transformers.AutoModelForCausalLM, "seq2seq": transformers.AutoModelForSeq2SeqLM}[name]


def _auto_class(config: Any) -> Any:
    """AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel, or the very class that `architectures` names."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = (getattr(config, "architectures", None) or [None])[0]
    families = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    for family, mapping in families.items():
        if type(config) in mapping and named == mapping[type(config)].__name__:
            return _family(family)
    if named and isinstance(getattr(transformers, named, None), type):
        return getattr(transformers, named)
    if type(config) in families["causal"] and not getattr(config, "is_encoder_decoder", False):
        return _family("causal")
    return _family("seq2seq") if type(config) in families["seq2seq"] else transformers.AutoModel


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New parameters lose their storage as they are registered; buffers keep their values."""
    register = torch.nn.Module.register_parameter

    def register_empty(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
