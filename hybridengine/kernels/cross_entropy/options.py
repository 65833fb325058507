"""What `cross_entropy` can be asked for, in the order of its operator, and what its sums are divided by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridengine.kernels.native import accumulator_dtype

__all__ = ["EMPTY", "REDUCTIONS", "SCHEMA", "Options", "bad_label", "factors", "is_soft", "without_ignored"]

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # the numbers of torch.nn._reduction
EMPTY = ("nan", "zero")
SCHEMA = (
    "int ignore_index, float label_smoothing, float scale, float softcap, float z_loss, int reduction, "
    "bool empty_is_zero"
)


class Options(NamedTuple):
    """The operator's options, in its order."""

    ignore_index: int
    label_smoothing: float
    scale: float
    softcap: float  # 0: none
    z_loss: float
    reduction: int
    empty_is_zero: bool

    @property
    def is_plain(self) -> bool:
        """Whether torch's own cross-entropy has all of this."""
        return self.scale == 1.0 and self.softcap == 0.0 and self.z_loss == 0.0


def is_soft(target: Tensor) -> bool:
    """Whether `target` holds probabilities instead of labels."""
    return target.is_floating_point()


def bad_label(row: int, label: int, classes: int, ignore_index: int) -> str:
    """Return what is said of a label that is no class; the native library has the same words."""
    return f"target[{row}] = {label} is not one of the {classes} classes (ignore_index is {ignore_index})"


def without_ignored(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return rows `x` with zeros where the label is ignored: 0 * NaN would be NaN in every derivative."""
    return x.masked_fill((target == ignore_index).unsqueeze(-1), 0)


def factors(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each row's loss and each row's z term are multiplied by, and what a loss over nothing adds to 0.

    Scalars in the accumulator's dtype on the logits' device; nothing is read back to the host.
    """
    dtype = accumulator_dtype(logits.dtype)
    one = torch.ones((), dtype=dtype, device=logits.device)
    if options.reduction != REDUCTIONS["mean"]:
        return one, one, one - one
    if is_soft(target):
        rows = total = one * target.shape[0]
    else:
        counted = target != options.ignore_index
        rows = counted.sum().to(dtype)
        label = target.masked_fill(~counted, 0)
        total = rows if weight is None else (weight.to(dtype)[label] * counted).sum()
    nothing = torch.where(total == 0, 0.0 if options.empty_is_zero else float("nan"), one - one)
    # Over nothing the gradient is 0, also where the loss is NaN: such a batch must not destroy the weights.
    return torch.where(total == 0, 0.0, one / total), torch.where(rows == 0, 0.0, one / rows), nothing
