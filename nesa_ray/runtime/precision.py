"""Mixed precision: the stage computes with bf16 copies of its fp32 parameters, whose fp32 gradients it adds up.

(Micikevicius et al., arXiv 1710.03740, with bf16 and so without loss scaling.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nesa_ray.runtime.gradients import add_gradient


def working_copies(masters: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Leaves in `dtype` to compute with; every micro-batch's gradient is added to the `.grad` of the masters."""
    copies = {}
    for name, master in masters.items():
        copy = master.detach().to(dtype)
        if master.requires_grad:
            copy.requires_grad_().register_post_accumulate_grad_hook(_hand_over)
            copy.master = master
        copies[name] = copy
    return copies


def _hand_over(copy: torch.Tensor) -> None:
    gradient, copy.grad = copy.grad, None
    if gradient is not None:  # operators that add theirs in place give none (weight_gradient.py)
        add_gradient(copy, gradient)
