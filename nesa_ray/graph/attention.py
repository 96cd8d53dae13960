"""Attention as one operator of the captured graph: `nesa::attention`.

The operator only marks the place: when a stage is split, the node is bound to a differentiable scaled dot product
(training, `scaled_dot_product`) or to a key-value cache (serving).  Hugging Face models reach it through the
attention interface of transformers, so no architecture needs code here.

Shapes: B batch, H query heads, G key-value heads (H is a multiple of G), T query tokens, S key tokens, D head width.
"""

from typing import Any

import torch

from nesa_ray.errors import CaptureError

LIBRARY = torch.library.Library("nesa", "FRAGMENT")
LIBRARY.define(
    "attention(Tensor q_BHTD, Tensor k_BGSD, Tensor v_BGSD, Tensor? bias, float scale, bool causal, int window, "
    "float softcap, float dropout) -> Tensor"
)


@torch.library.register_fake("nesa::attention")
def _attention_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def scaled_dot_product(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dropout: float,
) -> torch.Tensor:
    """softmax(softcap(q kᵀ · scale) + bias + mask) v, differentiable; [B, H, T, D].

    `window` > 0 lets each token see itself and the window - 1 before it; `softcap` > 0 squashes scores by
    softcap · tanh(scores / softcap) (Gemma 2, arXiv 2408.00118); queries are the last T of the S positions.
    """
    tokens, keys = q_BHTD.shape[-2], k_BGSD.shape[-2]
    mask = bias
    windowed = window > 0 and keys > window
    if windowed or (causal and (bias is not None or tokens != keys or softcap)):
        at = torch.arange(keys - tokens, keys, device=q_BHTD.device)[:, None]
        to = torch.arange(keys, device=q_BHTD.device)[None, :]
        seen = (to <= at) if causal else torch.ones_like(to <= at)
        if windowed:
            seen = seen & (to > at - window)
        mask = torch.where(seen, 0.0 if bias is None else bias, float("-inf")).to(q_BHTD.dtype)
        causal = False
    if softcap:
        group = q_BHTD.shape[1] // k_BGSD.shape[1]
        k, v = k_BGSD.repeat_interleave(group, 1), v_BGSD.repeat_interleave(group, 1)
        scores = softcap * torch.tanh(q_BHTD @ k.transpose(-1, -2) * (scale / softcap))
        weights = torch.softmax(scores if mask is None else scores + mask, -1, dtype=torch.float32).to(v.dtype)
        return torch.dropout(weights, dropout, True) @ v
    return torch.nn.functional.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, mask, dropout, causal, scale=scale, enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1]
    )


NAME = "nesa"


def register_with_transformers() -> None:
    """Makes `attn_implementation="nesa"` known to transformers.  Idempotent."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if s_aux is not None:
        raise CaptureError(f"{type(module).__name__}: attention sinks aren't part of nesa::attention")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = attention_mask if position_bias is None else position_bias
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = torch.ops.nesa.attention(
        query, key, value, bias, scale, causal, sliding_window or 0, softcap or 0.0, dropout
    )
    return mixed.transpose(1, 2), None
