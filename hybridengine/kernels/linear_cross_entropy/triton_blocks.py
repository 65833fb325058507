"""The Triton kernels of a GPU's `mode="low_memory"`: one block of classes of every row at a time.

A row is that of `cross_entropy/triton_row.py`, in pieces: `sum_block` goes on with the row's sums where the block
before left them, `write_block` writes the block's part of the gradient once they are known.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton reads the functions as a language of its own, without annotations.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridengine.kernels.cross_entropy.options import Options, is_soft
from hybridengine.kernels.cross_entropy.triton_kernel import constants, launch_options, target_kind
from hybridengine.kernels.cross_entropy.triton_row import SOFT, bend, sum_row, write_gradient

__all__ = ["sum_block", "write_block"]


@triton.jit
def _sum_rows(
    logits, logits_stride, target, target_stride, weight, sums, label_y, rows, first, classes, kept, uniform, scale,
    inner, softcap, TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    logits += index * logits_stride
    target += index * target_stride
    at = sums + index
    maximum, exponentials, gap, mass = sum_row(
        logits, target, weight, classes, kept, uniform, scale, inner, softcap,
        tl.load(at), tl.load(at + rows), tl.load(at + 2 * rows), tl.load(at + 3 * rows),
        TARGET, WEIGHTED, CAPPED, BLOCK,
    )  # fmt: skip
    tl.store(at, maximum)
    tl.store(at + rows, exponentials)
    tl.store(at + 2 * rows, gap)
    tl.store(at + 3 * rows, mass)
    if TARGET != SOFT:
        label = tl.load(target) - first
        if (label >= 0) & (label < classes):
            y, _ = bend(tl.load(logits + label).to(tl.float32), scale, inner, softcap, CAPPED)
            tl.store(label_y + index, y)


@triton.jit
def _write_rows(
    logits, logits_stride, target, target_stride, weight, gradient, gradient_stride, hard, shift, by_exponential,
    by_share, first, classes, kept, uniform, scale, inner, softcap,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    target += index * target_stride
    label = 0
    if TARGET != SOFT:
        label = (tl.load(target) - first).to(tl.int32)
    write_gradient(
        logits + index * logits_stride, target, weight, gradient + index * gradient_stride, classes, label,
        tl.load(hard + index), tl.load(shift + index), tl.load(by_exponential + index), tl.load(by_share + index),
        kept, uniform, scale, inner, softcap, TARGET, WEIGHTED, CAPPED, BLOCK,
    )  # fmt: skip


def _shared(target: Tensor, weight: Tensor | None, first: int, classes: int, all_classes: int, options: Options) -> Any:
    """Return what both kernels are told of targets and options: of soft targets and weights the block's own part."""
    smoothing, softcap = options.label_smoothing, options.softcap
    kind, at = target_kind(target, smoothing), slice(first, first + classes)
    rows = target[:, at] if is_soft(target) else target
    chosen = constants(all_classes, smoothing, options.scale, softcap) | launch_options(classes, kind)
    chosen |= {"TARGET": kind, "WEIGHTED": weight is not None, "CAPPED": softcap > 0}
    return rows, rows.stride(0), None if weight is None else weight[at], chosen


def sum_block(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    all_classes: int,
    options: Options,
    sums: Tensor,
    label_y: Tensor,
) -> None:
    """Go on with the sums of every row.

    Args:
        logits: float32 [N, B], of the classes from `first` on, rows contiguous.
        target: int64 [N] or soft targets [N, V] with contiguous rows.
        weight: float32 [V].
        first: the block's first class.
        all_classes: V.
        options: of the loss.
        sums: float32 [4, N], in place: M, sum exp(y - M), sum q (M - y), sum q; the last two without the label's own.
        label_y: float32 [N], written for rows whose label is in the block.
    """
    rows, classes = logits.shape
    target, stride, weight, chosen = _shared(target, weight, first, classes, all_classes, options)
    kernel: Any = _sum_rows
    with torch.cuda.device_of(logits):
        kernel[(rows,)](logits, logits.stride(0), target, stride, weight, sums, label_y, rows, first, classes, **chosen)


def write_block(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    first: int,
    all_classes: int,
    options: Options,
    gradient: Tensor,
    hard: Tensor,
    shift: Tensor,
    by_exponential: Tensor,
    by_share: Tensor,
) -> None:
    """Write y' (by_exponential exp(y - shift) - by_share q) [N, B] into `gradient`; other arguments as `sum_block`.

    Args:
        gradient: like the logits, of any of the three dtypes.
        hard: float32 [N], what the label has beyond its dense share.
        shift, by_exponential, by_share: float32 [N].
    """
    rows, classes = logits.shape
    target, stride, weight, chosen = _shared(target, weight, first, classes, all_classes, options)
    kernel: Any = _write_rows
    with torch.cuda.device_of(logits):
        kernel[(rows,)](
            logits, logits.stride(0), target, stride, weight, gradient, gradient.stride(0), hard, shift,
            by_exponential, by_share, first, classes, **chosen,
        )  # fmt: skip
