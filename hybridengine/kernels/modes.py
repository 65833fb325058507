"""Ways of differentiating that a kernel's autograd function has no rule for, and that are left to plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["differentiated_again", "forward_mode", "is_transformed", "why_not_transformed"]


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on.

    A Function's `jvp` is silently wrong when forward mode is nested in forward mode (torch 2.13), so none is defined:
    in forward mode everything is plain torch.
    """
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def is_transformed(tensor: Tensor) -> bool:
    """Whether `tensor` only stands for another one, inside torch.func or a batched backward (`is_grads_batched`)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not torch._C._has_storage(tensor)


def why_not_transformed(*tensors: Tensor) -> str | None:
    """Say which transform of `torch.func` or mode stands in the way of an autograd function over these tensors."""
    if torch.compiler.is_compiling():
        return None
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return "it has no rule for torch.func transforms"
    if forward_mode():
        return "it has no rule for forward mode"
    return None


def differentiated_again(gradient: Tensor) -> bool:
    """Whether a backward must be of differentiable operations: of second order, in forward mode, or batched."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or forward_mode() or not torch._C._has_storage(gradient)
