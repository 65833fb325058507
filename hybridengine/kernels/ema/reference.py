"""The specification of the moving average, in plain torch: torch's lerp.

    average <- average + rate (weight - average)               rate < 1/2
    average <- weight - (1 - rate) (weight - average)          otherwise

Computed in the average's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record

__all__ = ["run"]


@torch.no_grad()
def run(averages: list[Tensor], weights: list[Tensor], rate: float) -> None:
    """Update the averages in place."""
    record("ema", "reference")
    if averages:
        wide = [weight.to(average.dtype) for average, weight in zip(averages, weights, strict=True)]
        torch._foreach_lerp_(averages, wide, rate)
