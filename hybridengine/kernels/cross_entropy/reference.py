"""The specification of cross-entropy, in plain torch.

With x = logits in float32 (float64 for float64), p = softmax(x), a row's label t, class weights w (1 if none) and
smoothing e, a row that is not ignored has the loss

    l = (1 - e) w_t (-log p_t) + (e / V) sum_j w_j (-log p_j)

and an ignored row 0. "sum" adds the rows, "mean" divides that by the summed w_t of the rows that count. The gradient
of a row is

    dl/dx_j = c p_j - (1 - e) w_t [j = t] - (e / V) w_j        with c = (1 - e) w_t + (e / V) sum_j w_j
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["run"]

_torch_cross_entropy: Callable[..., Tensor] = torch._C._nn.cross_entropy_loss
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the numbers of torch.nn._reduction


def run(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    empty: str,
) -> Tensor:
    """Return the loss; arguments as in `cross_entropy`."""
    record("cross_entropy", "reference")
    dtype = accumulator_dtype(logits.dtype)
    if logits.dtype != dtype:
        logits = logits.to(dtype)
    if weight is not None:
        weight = weight.to(dtype)
    zero_if_empty = reduction == "mean" and empty == "zero"
    torch_reduction = _REDUCTIONS["sum" if zero_if_empty else reduction]
    try:
        # What torch.nn.functional.cross_entropy calls after choosing this number; small losses feel the difference.
        loss = _torch_cross_entropy(logits, target, weight, torch_reduction, ignore_index, label_smoothing)
    except IndexError as error:
        raise IndexError(_describe_bad_label(target, logits.shape[1], ignore_index)) from error
    if not zero_if_empty:
        return loss
    counted = target != ignore_index
    if weight is None:
        total = counted.sum().to(dtype)
    else:
        total = torch.where(counted, weight[target.masked_fill(~counted, 0)], 0).sum()
    return loss / torch.where(total == 0, torch.ones_like(total), total)


def _describe_bad_label(target: Tensor, classes: int, ignore_index: int) -> str:
    """Say which label is out of range, in the native kernels' words."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    row = int(bad.nonzero()[0]) if bool(bad.any()) else -1
    label = int(target[row]) if row >= 0 else 0
    return f"target[{row}] = {label} is not one of the {classes} classes (ignore_index is {ignore_index})"
