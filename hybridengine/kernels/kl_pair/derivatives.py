"""The gradients of the divergence in plain torch, differentiable by autograd to any order.

Notation and formulas: `reference.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hybridengine.kernels.kl_pair.reference import REDUCTIONS, log_probabilities, wide_dtype

__all__ = ["DIRECTIONS", "REDUCTIONS", "Options", "count_of", "unit_gradients"]

DIRECTIONS = {"forward": 0, "reverse": 1, "symmetric": 2}


class Options(NamedTuple):
    """The operator's options, in its order."""

    temperature: float
    direction: int
    reduction: int
    empty_is_zero: bool


def count_of(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return what a mean over the last dimension of `rows` divides by, in their dtype."""
    return rows.new_tensor(rows.shape[-1]) if mask is None else mask.sum(-1).to(rows.dtype)


def unit_gradients(a: Tensor, b: Tensor, mask: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Return d loss / d a and d loss / d b [N, V] in the accumulator's dtype; for "none" each row's own."""
    dtype = wide_dtype(a, b)
    log_p, log_q = (log_probabilities(x, mask, options.temperature, dtype) for x in (a, b))
    if options.direction == DIRECTIONS["forward"]:
        by_a, by_b = _of_divergence(log_p, log_q)
    elif options.direction == DIRECTIONS["reverse"]:
        by_b, by_a = _of_divergence(log_q, log_p)
    else:
        forward, reverse = _of_divergence(log_p, log_q), _of_divergence(log_q, log_p)
        by_a, by_b = (forward[0] + reverse[1]) / 2, (forward[1] + reverse[0]) / 2
    scale = log_p.new_tensor(1.0 / options.temperature)
    if options.reduction == REDUCTIONS["mean"]:
        scale = scale / count_of(log_p[:, 0], mask).clamp_min(1.0)
    return by_a * scale, by_b * scale


def _of_divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of KL(p || q) by the logits of p and of q."""
    p, q = log_p.exp(), log_q.exp()
    difference = (log_p - log_q).masked_fill(log_p == -float("inf"), 0.0)
    return p * (difference - (p * difference).sum(-1, keepdim=True)), q - p
