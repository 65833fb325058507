"""The specification of GELU, in plain torch: torch's own with `approximate="none"`.

The value is x Phi(x), its derivative Phi(x) + x phi(x), where Phi(x) = (1 + erf(x / sqrt 2)) / 2 is the distribution
function of the standard normal and phi(x) = exp(-x^2/2) / sqrt(2 pi) its density. Infinity has the value infinity;
NaN and minus infinity have the value NaN, and all three the derivative NaN. (Torch's AVX-512 kernel has NaN at
infinity, too.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record

__all__ = ["run"]


def run(x: Tensor) -> Tensor:
    """Return x Phi(x)."""
    record("gelu", "reference")
    result: Tensor = torch.ops.aten.gelu(x)  # not `functional.gelu`, which `fast_forward` watches
    return result
