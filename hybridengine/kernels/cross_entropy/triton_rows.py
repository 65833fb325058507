"""The Triton kernels of cross-entropy: one program a row, read once for its sums and once more for the gradient.

What they do with a row is that of `triton_row`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton reads the functions as a language of its own, without annotations.

from __future__ import annotations

import triton
import triton.language as tl

from hybridengine.kernels.cross_entropy.triton_row import (
    LABELS,
    SOFT,
    bend,
    dense_shares,
    shift_of,
    sum_row,
    write_gradient,
)

__all__ = ["backward_rows", "forward_rows"]


@triton.jit
def _write_zeros(gradient, classes, BLOCK: tl.constexpr):
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), gradient.dtype.element_ty)
        tl.store(gradient + columns, zeros, mask=columns < classes)


@triton.jit
def _note_bad_label(flag, index, label, classes):
    """Note the first bad label of the launch."""
    nothing = tl.zeros((), tl.int64)
    if tl.atomic_cas(flag, nothing, index + 1) == 0:
        tl.store(flag + 1, label)
        tl.store(flag + 2, classes)


@triton.jit
def _open_row(target, classes, ignore_index, TARGET: tl.constexpr):
    """Return the row's label, whether the row counts, and whether its label is bad."""
    label = tl.zeros((), tl.int64)
    is_class = label == 0
    is_kept = is_class
    if TARGET != SOFT:
        label = tl.load(target)
        is_class = (label >= 0) & (label < classes)
        is_kept = label != ignore_index
    return label, is_class & is_kept, is_kept & (is_class == 0)


@triton.jit
def _hard_share(weight, label, kept, TARGET: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return what the label has beyond its dense share: (1 - e) w_t, 0 for soft targets."""
    hard = tl.zeros((), tl.float32)
    if TARGET != SOFT:
        hard += kept
        if WEIGHTED:
            hard *= tl.load(weight + label)
    return hard


@triton.jit
def _count_row(
    logits, soft, weight, factors, loss, lse, gradient, classes, label,
    kept, uniform, dense_mass, scale, inner, softcap, z_loss,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, Z: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the loss, logsumexp and gradient of a row that counts."""
    hard = _hard_share(weight, label, kept, TARGET, WEIGHTED)
    # Read before the barrier below: after it the gradient may take the logits' place.
    label_y, _ = bend(tl.load(logits + label).to(tl.float32), scale, inner, softcap, CAPPED)
    nothing = tl.zeros((), tl.float32)
    maximum, exponentials, gap, mass = sum_row(
        logits, soft, weight, classes, kept, uniform, scale, inner, softcap,
        nothing + float("-inf"), nothing, nothing, nothing, TARGET, WEIGHTED, CAPPED, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    if TARGET != SOFT:
        mass = dense_mass
    log_sum = tl.where(exponentials > 0.0, tl.log(exponentials), float("nan"))
    row_lse = maximum + log_sum
    row_loss = gap * 1.0
    if TARGET != LABELS:
        row_loss += mass * log_sum
    if TARGET != SOFT:
        row_loss += tl.where(hard == 0.0, 0.0, hard * (maximum - label_y)) + hard * log_sum
    s = tl.load(factors)
    row_loss *= s
    by_probability = s * (hard + mass)
    if Z:
        z = tl.load(factors + 1) * z_loss
        row_loss += z * row_lse * row_lse
        by_probability += 2.0 * z * row_lse
    tl.store(loss, row_loss)
    tl.store(lse, row_lse)
    if GRADIENT:
        # p = exp(y - M) / S: exp(y - lse) would carry the rounding error of lse, which grows with M.
        write_gradient(
            logits, soft, weight, gradient, classes, label.to(tl.int32), hard, shift_of(maximum),
            by_probability / exponentials, s, kept, uniform, scale, inner, softcap, TARGET, WEIGHTED, CAPPED, BLOCK,
        )  # fmt: skip


@triton.jit
def forward_rows(
    logits, logits_stride, target, target_stride, weight, factors, factors_stride, loss, lse, gradient, gradient_stride,
    flag, ignore_index, classes, kept, uniform, dense_mass, scale, inner, softcap, z_loss,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, Z: tl.constexpr,
    GRADIENT: tl.constexpr, FLAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)  # rows * classes may exceed 2^31
    logits += index * logits_stride
    target += index * target_stride
    factors += index * factors_stride
    if GRADIENT:
        gradient += index * gradient_stride
    label, counts, is_bad = _open_row(target, classes, ignore_index, TARGET)
    if FLAGGED:
        if is_bad:
            _note_bad_label(flag, index, label, classes)
    if counts:
        _count_row(
            logits, target, weight, factors, loss + index, lse + index, gradient, classes, label,
            kept, uniform, dense_mass, scale, inner, softcap, z_loss, TARGET, WEIGHTED, CAPPED, Z, GRADIENT, BLOCK,
        )  # fmt: skip
    else:  # it contributes nothing, whatever it holds, NaN included
        tl.store(loss + index, 0.0)
        tl.store(lse + index, 0.0)
        if GRADIENT:
            _write_zeros(gradient, classes, BLOCK)


@triton.jit
def _soft_mass(soft, weight, classes, kept, uniform, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Return sum q of soft targets."""
    mass = tl.zeros((), tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mass += tl.sum(dense_shares(columns, columns < classes, soft, weight, kept, uniform, SOFT, WEIGHTED), 0)
    return mass


@triton.jit
def backward_rows(
    logits, logits_stride, target, target_stride, weight, factors, factors_stride, lse, grad_loss, grad_loss_stride,
    grad_lse, gradient, gradient_stride, ignore_index, classes, kept, uniform, dense_mass, scale, inner, softcap,
    z_loss, TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, Z: tl.constexpr,
    LSE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    logits += index * logits_stride
    target += index * target_stride
    factors += index * factors_stride
    gradient += index * gradient_stride
    label, counts, _ = _open_row(target, classes, ignore_index, TARGET)
    if counts:
        hard = _hard_share(weight, label, kept, TARGET, WEIGHTED)
        mass = hard + dense_mass
        if TARGET == SOFT:
            mass = _soft_mass(target, weight, classes, kept, uniform, WEIGHTED, BLOCK)
        row_lse = tl.load(lse + index)
        s = tl.load(factors)
        incoming = tl.load(grad_loss + index * grad_loss_stride)
        by_probability = s * mass
        if Z:
            by_probability += 2.0 * tl.load(factors + 1) * z_loss * row_lse
        by_probability *= incoming
        if LSE_GRADIENT:
            by_probability += tl.load(grad_lse + index)
        write_gradient(
            logits, target, weight, gradient, classes, label.to(tl.int32), hard, row_lse, by_probability,
            incoming * s, kept, uniform, scale, inner, softcap, TARGET, WEIGHTED, CAPPED, BLOCK,
        )  # fmt: skip
    else:
        _write_zeros(gradient, classes, BLOCK)
