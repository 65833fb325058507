"""The specification of the total norm, in plain torch: the root of the sum of squares of all entries.

Each tensor's own norm is taken in float32 (float64 for float64), as torch's clipping does, and they are combined in
float64. The native kernel sums in float64 throughout, and so has no overflow at entries above 1e19.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["run"]


def run(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm, float64, on the first tensor's device."""
    record("total_norm", "reference")
    norms: list[Tensor] = []
    for wide in (torch.float32, torch.float64):
        group = [tensor for tensor in tensors if accumulator_dtype(tensor.dtype) == wide]
        norms += torch._foreach_norm(group, dtype=wide) if group else ()
    result: Tensor = torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
    return result
