"""A row of cross-entropy in Triton: what the kernels of `triton_rows` and of `mode="low_memory"` are made of.

Formula and derivations stand in `csrc/cross_entropy/cuda.cuh`; the names are the same here.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton reads the functions as a language of its own, without annotations.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LABELS", "PACK", "SMOOTHED", "SOFT", "bend", "dense_shares", "shift_of", "sum_row", "write_gradient"]

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
def dense_shares(columns, inside, soft, weight, kept, uniform, TARGET: tl.constexpr, WEIGHTED: tl.constexpr):
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
        shares = dense_shares(columns, inside, soft, weight, kept, uniform, TARGET, WEIGHTED)
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
        shares = dense_shares(columns, inside, soft, weight, kept, uniform, TARGET, WEIGHTED)
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
