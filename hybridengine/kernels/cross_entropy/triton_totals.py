"""What all labels of a loss say together, by one small Triton kernel: some dozen launches of plain torch otherwise."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton reads the functions as a language of its own, without annotations.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["label_totals"]

_BLOCK = 2048


@triton.jit(do_not_specialize=["rows", "ignore_index", "classes"])
def _totals(
    target, target_stride, weight, rows, ignore_index, classes, factors, totals,
    WEIGHTED: tl.constexpr, MEAN: tl.constexpr, EMPTY_IS_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float64)
    bad = tl.zeros((BLOCK,), tl.int64) + rows
    for start in range(0, rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < rows
        label = tl.load(target + index.to(tl.int64) * target_stride, mask=inside, other=0)
        counted = inside & (label != ignore_index)
        is_class = (label >= 0) & (label < classes)
        count += counted.to(tl.int32)
        if WEIGHTED:
            mass += tl.load(weight + label, mask=counted & is_class, other=0.0).to(tl.float64)
        bad = tl.minimum(bad, tl.where(counted & (is_class == 0), index, rows))
    number = tl.sum(count, 0).to(tl.float64)
    total = number
    if WEIGHTED:
        total = tl.sum(mass, 0)
    tl.store(totals, number)
    tl.store(totals + 1, total)
    tl.store(totals + 2, tl.min(bad, 0).to(tl.float64))
    s, z, nothing = number * 0.0 + 1.0, number * 0.0 + 1.0, number * 0.0
    if MEAN:
        # Over nothing the gradient is 0, also where the loss is NaN: such a batch must not destroy the weights.
        s = tl.where(total == 0.0, 0.0, 1.0 / total)
        z = tl.where(number == 0.0, 0.0, 1.0 / number)
        if EMPTY_IS_ZERO == 0:
            nothing = tl.where(total == 0.0, float("nan"), 0.0)
    tl.store(factors, s.to(tl.float32))
    tl.store(factors + 1, z.to(tl.float32))
    tl.store(factors + 2, nothing.to(tl.float32))


def label_totals(
    target: Tensor, weight: Tensor | None, classes: int, ignore_index: int, mean: bool, empty_is_zero: bool
) -> tuple[Tensor, Tensor]:
    """Return what `options.factors` returns, and what it follows from.

    Args:
        target: int64 [N].
        weight: float32 [V] or None.
        classes: V.
        ignore_index: labels that do not count.
        mean: whether the loss is a mean.
        empty_is_zero: whether a mean over nothing is 0 instead of NaN.

    Returns:
        float32 [3]: the factors of a row's loss and of its z term, what a loss over nothing adds to 0; and float64 [3]:
        the number of labels that count, the sum of their weights, and the first row whose label is no class (N: none).
    """
    factors = torch.empty(3, dtype=torch.float32, device=target.device)
    totals = torch.empty(3, dtype=torch.float64, device=target.device)
    kernel: Any = _totals
    with torch.cuda.device_of(target):
        kernel[(1,)](
            target, target.stride(0), weight, len(target), ignore_index, classes, factors, totals,
            WEIGHTED=weight is not None, MEAN=mean, EMPTY_IS_ZERO=int(empty_is_zero), BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return factors, totals
