"""The Triton kernels of cross-entropy: one program a row, read once for its sums and once more for the gradient.

Formula and derivations stand in `csrc/cross_entropy/cuda.cuh`; the names are the same here.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton reads the functions as a language of its own, without annotations.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LABELS", "SMOOTHED", "SOFT", "backward_rows", "bend", "forward_rows", "sum_row", "write_gradient"]

# What TARGET may be: a label a row, the same with a share for every class, a distribution a row.
LABELS = tl.constexpr(0)
SMOOTHED = tl.constexpr(1)
SOFT = tl.constexpr(2)

# A row is worked on up to the last multiple of this, which the compiler can read 16 bytes at a time where rows are
# aligned, and then the few columns that are left.
PACK = tl.constexpr(16)


@triton.jit
def _tanh(x):
    """Return tanh(x) to some units in the last place; libdevice's does not run in the interpreter.

    From the exponential away from 0; near 0, where that would cancel, by the odd Taylor polynomial of degree 13: its
    error at 0.4 is below 1e-8 of the value.
    """
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    s = x * x
    series = 1.0 + s * (
        -0.3333333333333333
        + s
        * (
            0.13333333333333333
            + s
            * (
                -0.05396825396825397
                + s * (0.021869488536155203 + s * (-0.008863235529902197 + s * 0.003592128036572481))
            )
        )
    )
    return tl.where(size < 0.4, x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def bend(x, scale, inner, softcap, CAPPED: tl.constexpr):
    """Return y and y'."""
    if CAPPED:
        bent = _tanh(x * inner)
        return bent * softcap, scale * (1.0 - bent * bent)
    else:
        return x * scale, scale + 0.0 * tl.zeros_like(x)


@triton.jit
def shift_of(maximum):
    """Return what is subtracted: not the maximum while nothing but -inf was seen, as -inf - -inf is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _dense_shares(columns, inside, soft, weight, kept, uniform, TARGET: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return the part of q that every class has; 0 outside of the row."""
    shares = tl.where(inside, uniform, 0.0) + tl.zeros(columns.shape, tl.float32)
    if TARGET == SOFT:
        shares += kept * tl.load(soft + columns, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        shares *= tl.load(weight + columns, mask=inside, other=0.0)
    return shares


@triton.jit
def _write_gradient_at(
    columns, inside, logits, soft, weight, gradient, label, hard, shift, by_exponential, by_share,
    kept, uniform, scale, inner, softcap, TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
    y, slope = bend(x, scale, inner, softcap, CAPPED)
    value = by_exponential * tl.exp(y - shift)
    if TARGET == LABELS:
        # The label's entry is a difference of near numbers: formed in float32, rounded once.
        value -= tl.where(columns == label, by_share * hard, 0.0)
    else:
        shares = _dense_shares(columns, inside, soft, weight, kept, uniform, TARGET, WEIGHTED)
        if TARGET == SMOOTHED:
            shares += tl.where(columns == label, hard, 0.0)
        value -= by_share * shares
    tl.store(gradient + columns, (slope * value).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def write_gradient(
    logits, soft, weight, gradient, classes, label, hard, shift, by_exponential, by_share,
    kept, uniform, scale, inner, softcap,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y'_j (by_exponential exp(y_j - shift) - by_share q_j): the second read of a row."""
    packed = classes // PACK * PACK
    for start in range(0, packed, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _write_gradient_at(
            columns, columns < packed, logits, soft, weight, gradient, label, hard, shift, by_exponential, by_share,
            kept, uniform, scale, inner, softcap, TARGET, WEIGHTED, CAPPED,
        )  # fmt: skip
    if packed < classes:
        columns = packed + tl.arange(0, PACK)
        _write_gradient_at(
            columns, columns < classes, logits, soft, weight, gradient, label, hard, shift, by_exponential, by_share,
            kept, uniform, scale, inner, softcap, TARGET, WEIGHTED, CAPPED,
        )  # fmt: skip


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
def _add_to_sums(
    columns, inside, maximum, exponentials, gap, mass, logits, soft, weight, kept, uniform, scale, inner, softcap,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
    y, _ = bend(x, scale, inner, softcap, CAPPED)
    y = tl.where(inside, y, float("-inf"))
    before = maximum
    maximum = tl.maximum(maximum, tl.max(y, 0))
    shift = shift_of(maximum)
    exponentials = exponentials * tl.exp(before - shift) + tl.sum(tl.exp(y - shift), 0)
    if TARGET != LABELS:
        shares = _dense_shares(columns, inside, soft, weight, kept, uniform, TARGET, WEIGHTED)
        gaps = tl.where(shares == 0.0, 0.0, shares * (shift - y))  # 0 * inf would be NaN; outside they are 0
        gap += mass * (shift - shift_of(before)) + tl.sum(gaps, 0)
        mass += tl.sum(shares, 0)
    return maximum, exponentials, gap, mass


@triton.jit
def sum_row(
    logits, soft, weight, classes, kept, uniform, scale, inner, softcap, maximum, exponentials, gap, mass,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return M, sum exp(y - M), sum q (M - y) and sum q: the first read of a row. The last two leave out the label.

    They go on from what is given: -inf and zeros for a whole row.
    """
    packed = classes // PACK * PACK
    for start in range(0, packed, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        maximum, exponentials, gap, mass = _add_to_sums(
            columns, columns < packed, maximum, exponentials, gap, mass, logits, soft, weight,
            kept, uniform, scale, inner, softcap, TARGET, WEIGHTED, CAPPED,
        )  # fmt: skip
    if packed < classes:
        columns = packed + tl.arange(0, PACK)
        maximum, exponentials, gap, mass = _add_to_sums(
            columns, columns < classes, maximum, exponentials, gap, mass, logits, soft, weight,
            kept, uniform, scale, inner, softcap, TARGET, WEIGHTED, CAPPED,
        )  # fmt: skip
    return maximum, exponentials, gap, mass


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
        mass += tl.sum(_dense_shares(columns, columns < classes, soft, weight, kept, uniform, SOFT, WEIGHTED), 0)
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
