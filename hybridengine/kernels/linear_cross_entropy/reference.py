"""The specification: the head as a matrix product, then `cross_entropy` of all its logits, in plain torch.

    logits = x W^T + b        loss: `cross_entropy/reference.py`

computed in float32 (float64 for float64). It holds N x V logits; whatever else computes this function holds some rows
of them at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy import reference
from hybridengine.kernels.cross_entropy.options import Options, is_soft, without_ignored
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["run"]


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: Options,
    want_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss and, if wanted, each row's log-sum-exp; arguments as in `linear_cross_entropy`."""
    record("linear_cross_entropy", "reference")
    dtype = accumulator_dtype(x.dtype)
    wide = x.to(dtype)
    if not is_soft(target) and reference.may_ignore(target, len(weight), options.ignore_index):
        wide = without_ignored(wide, target, options.ignore_index)
    with torch.autocast(x.device.type, enabled=False):
        logits = wide @ weight.to(dtype).t()
        if bias is not None:
            logits = logits + bias.to(dtype)
        return reference.run(logits, target, class_weight, options, want_lse)
