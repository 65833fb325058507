"""The specification of the move, in plain torch.

With g a weight's gradient, ||.|| over all tensors for SAM and ASAM:

    SAM:   w += rho g / ||g||
    ASAM:  w += rho s^2 g / ||s g||,          s = |w| + eta
    AWP:   w += rho ||w|| g / ||g||           each tensor by itself

A norm that is zero or not finite moves nothing. Computed in float32 (float64 for float64) and rounded to the weight's
dtype; norms of several tensors are combined in float64. The native kernel computes in float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype
from hybridengine.kernels.perturb_weights.moved import MovedWeights

__all__ = ["run"]


@torch.no_grad()
def run(weights: list[Tensor], gradients: list[Tensor], rule: str, rho: float, eta: float) -> MovedWeights:
    """Move the weights; return what restores them."""
    record("perturb_weights", "reference")
    w = [one.to(accumulator_dtype(one.dtype)) for one in weights]
    g = [one.to(wide.dtype) for one, wide in zip(gradients, w, strict=True)]
    size = [one.abs().add_(eta) for one in w] if rule == "asam" else []
    measured = torch._foreach_mul(size, g) if size else g
    norms = _norms(measured)
    norm = math.hypot(*norms)
    lengths = list(zip(_norms(w), norms, strict=True)) if rule == "awp" else [(1.0, norm)] * len(w)
    usable = any(0 < one < math.inf for _, one in lengths)
    rates = [_rate(rho * length, one) for length, one in lengths]
    if not any(rates):
        return MovedWeights(norm, usable, lambda: 0.0, lambda: None)
    saved = [one.clone() for one in weights]
    directions = torch._foreach_mul(measured, size) if size else measured
    rate = 1.0
    if len(set(rates)) == 1:  # SAM and ASAM: no offsets of their own
        rate = rates[0]
    else:
        moving = [i for i, one in enumerate(rates) if one]  # of the rest, a gradient may hold NaN
        weights, w = ([some[i] for i in moving] for some in (weights, w))
        saved = [saved[i] for i in moving]
        directions = torch._foreach_mul([directions[i] for i in moving], [rates[i] for i in moving])
    if all(wide is one for wide, one in zip(w, weights, strict=True)):
        torch._foreach_add_(weights, directions, alpha=rate)
    else:
        torch._foreach_copy_(weights, torch._foreach_add(w, directions, alpha=rate))
    return MovedWeights(norm, usable, lambda: _distance(weights, saved), lambda: torch._foreach_copy_(weights, saved))


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of each tensor, in one transfer."""
    if not tensors:
        return []
    norms = list(torch._foreach_norm(list(tensors)))
    if len({norm.dtype for norm in norms}) > 1:
        norms = [norm.double() for norm in norms]
    found: list[float] = torch.stack(norms).double().tolist()
    return found


def _rate(numerator: float, norm: float) -> float:
    rate = numerator / norm if 0 < norm < math.inf else 0.0
    return rate if math.isfinite(rate) else 0.0


def _distance(weights: list[Tensor], saved: list[Tensor]) -> float:
    wide = [one.to(accumulator_dtype(one.dtype)) for one in weights]
    return math.hypot(*_norms([one - old for one, old in zip(wide, saved, strict=True)]))
