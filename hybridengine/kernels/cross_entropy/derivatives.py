"""First and second derivative of cross-entropy in plain torch, differentiable by autograd to any order.

Notation and formula of the loss: `reference.py`. With s the factor of the reduction (1, or one over the denominator)
and G = s (c p - (1 - e) w_t onehot(t) - (e / V) w) the gradient of a row, its Hessian is s c (diag(p) - p p^T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridengine.kernels.native import accumulator_dtype

__all__ = ["Options", "denominator", "hessian_times", "unit_gradient"]

_MEAN = 2


class Options(NamedTuple):
    """The operator's options, in its order."""

    ignore_index: int
    label_smoothing: float
    reduction: int
    empty_is_zero: bool


def denominator(target: Tensor, weight: Tensor | None, options: Options, dtype: torch.dtype) -> Tensor:
    """Return what a mean divides by, over the last dimension of `target`."""
    counted = target != options.ignore_index
    if weight is None:
        return counted.sum(-1).to(dtype)
    return (weight.to(dtype)[target.masked_fill(~counted, 0)] * counted).sum(-1)


class _Parts(NamedTuple):
    probabilities: Tensor  # [N, V]
    label: Tensor  # [N], 0 where ignored
    hard: Tensor  # [N], (1 - e) w_t
    soft: Tensor  # [] or [V], (e / V) w
    total: Tensor  # [N], c
    scale: Tensor  # [N], s; 0 where ignored


def _parts(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> _Parts:
    dtype = accumulator_dtype(logits.dtype)
    counted = target != options.ignore_index
    # Ignored rows are emptied before anything is computed: 0 * NaN would be NaN in every later derivative.
    x = logits.to(dtype).masked_fill(~counted.unsqueeze(-1), 0.0)
    label = target.masked_fill(~counted, 0)
    weights = x.new_ones(x.shape[-1]) if weight is None else weight.to(dtype)
    hard = (1.0 - options.label_smoothing) * weights[label]
    soft = options.label_smoothing / x.shape[-1] * weights
    scale = counted.to(dtype)
    if options.reduction == _MEAN:
        divisor = denominator(target, weight, options, dtype)
        scale = scale * torch.where(divisor == 0, 0.0, 1.0 / divisor)
    return _Parts(torch.softmax(x, -1), label, hard, soft, hard + soft.sum(), scale)


def unit_gradient(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Return d loss / d logits [N, V] in the accumulator's dtype; for "none" each row's own."""
    parts = _parts(logits, target, weight, options)
    onehot = torch.zeros_like(parts.probabilities).scatter(-1, parts.label.unsqueeze(-1), 1.0)
    gradient = parts.total.unsqueeze(-1) * parts.probabilities - parts.hard.unsqueeze(-1) * onehot - parts.soft
    return parts.scale.unsqueeze(-1) * gradient


def hessian_times(direction: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Return the Hessian of each row times `direction` [N, V], in the accumulator's dtype."""
    parts = _parts(logits, target, weight, options)
    p = parts.probabilities
    moved = p * (direction - (p * direction).sum(-1, keepdim=True))
    return (parts.scale * parts.total).unsqueeze(-1) * moved
