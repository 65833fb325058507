"""The Triton kernel of the divergence: one program a row.

The maths, with the names used here, is derived in `csrc/kl_pair/terms.inl`. Three loops over the row: maxima, sums,
divergence and gradients. The exponentials are computed again in the last one, which costs a GPU less than keeping them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton reads the functions as a language of its own, without annotations.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["kl_rows"]

_LARGEST = tl.constexpr(8.5e37)  # differences beyond count as infinite; a sum of two does not overflow


@triton.jit
def _excess(u):
    """exp(-u) - 1 + u by its Taylor series, for |u| < 1."""
    h = u * (1.0 / 3628800) - 1.0 / 362880
    h = h * u + 1.0 / 40320
    h = h * u - 1.0 / 5040
    h = h * u + 1.0 / 720
    h = h * u - 1.0 / 120
    h = h * u + 1.0 / 24
    h = h * u - 1.0 / 6
    h = h * u + 0.5
    return h * u * u


@triton.jit
def _moved(a, b, inverse, shift):
    """The difference of the logits from what is usual in the row, and the same in the finite numbers."""
    difference = ((a - b) - shift) * inverse
    v = tl.where(difference > -_LARGEST, difference, -_LARGEST)
    return difference, tl.where(v < _LARGEST, v, _LARGEST)


@triton.jit
def _log_ratio(first, second, change):
    """log(second / first) with second = first + change; precise also where the change is small."""
    grown = change.to(tl.float64) / first.to(tl.float64)
    one = 1.0 + grown
    # The rounding of `one` cancels in the quotient: log1p(x) = log(1 + x) x / ((1 + x) - 1).
    near = tl.where(one == 1.0, grown, tl.log(one) * grown / tl.where(one == 1.0, 1.0, one - 1.0))
    far = tl.log(second.to(tl.float64) / first.to(tl.float64))
    return tl.where((grown < 0.5) & (grown > -0.5), near, far).to(tl.float32)


@triton.jit
def _load(logits, start, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """A block of logits; a class that does not exist has -inf."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(logits + column, mask=column < CLASSES, other=float("-inf")).to(tl.float32)


@triton.jit
def _store(gradient, start, values, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    tl.store(gradient + column, values.to(gradient.dtype.element_ty), mask=column < CLASSES)


@triton.jit
def _maximum(logits, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit; NaN is found by the sums."""
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, CLASSES, BLOCK):
        x = _load(logits, start, CLASSES, BLOCK)
        best = tl.where(x > best, x, best)
    return tl.max(best, 0)


@triton.jit
def _sums(
    a_logits, b_logits, a_top, b_top, inverse, SYMMETRIC: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    """S_a, S_b, r, the means of v under p and q (NaN where the divergence is not finite), whether one is infinite."""
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    change = tl.zeros([BLOCK], tl.float32)
    first_moved = tl.zeros([BLOCK], tl.float32)
    second_moved = tl.zeros([BLOCK], tl.float32)
    first_only = tl.zeros([BLOCK], tl.int32)
    second_only = tl.zeros([BLOCK], tl.int32)
    for start in range(0, CLASSES, BLOCK):
        a = _load(a_logits, start, CLASSES, BLOCK)
        b = _load(b_logits, start, CLASSES, BLOCK)
        e = tl.exp((a - a_top) * inverse)
        f = tl.exp((b - b_top) * inverse)
        difference, v = _moved(a, b, inverse, a_top - b_top)
        first += e
        second += f
        change += tl.where(tl.abs(v) < 1.0, e * (_excess(v) - v), f - e)
        first_moved += e * v
        first_only |= (difference > _LARGEST).to(tl.int32)
        if SYMMETRIC:
            second_moved += f * v
            second_only |= (difference < -_LARGEST).to(tl.int32)
    first_sum = tl.sum(first, 0)
    second_sum = tl.sum(second, 0)
    rest = _log_ratio(first_sum, second_sum, tl.sum(change, 0))
    unknown = rest != rest
    forward_infinite = tl.max(first_only, 0) > 0
    reverse_infinite = tl.max(second_only, 0) > 0
    first_mean = tl.where(forward_infinite | unknown, float("nan"), tl.sum(first_moved, 0) / first_sum)
    second_mean = tl.where(reverse_infinite | unknown, float("nan"), tl.sum(second_moved, 0) / second_sum)
    return first_sum, second_sum, rest, first_mean, second_mean, forward_infinite | reverse_infinite


@triton.jit
def kl_rows(
    a_logits,
    b_logits,
    mask,
    scale,  # one number, on the device: of the gradients
    losses,
    by_a,
    by_b,
    a_stride,
    b_stride,
    inverse,  # 1 / T
    CLASSES: tl.constexpr,  # one number a model; the interpreter of Triton 3.6 takes no other bound with NumPy 2.4
    SYMMETRIC: tl.constexpr,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss of each row, and its gradients times `scale`."""
    row = tl.program_id(0).to(tl.int64)  # row * stride may be beyond 2^31
    a_logits += row * a_stride
    b_logits += row * b_stride
    by_a += row * CLASSES
    by_b += row * CLASSES
    if HAS_MASK:
        if tl.load(mask + row) == 0:  # nothing is read of a row that does not count
            nothing = tl.zeros([BLOCK], tl.float32)
            for start in range(0, CLASSES, BLOCK):
                if WANT_A:
                    _store(by_a, start, nothing, CLASSES, BLOCK)
                if WANT_B:
                    _store(by_b, start, nothing, CLASSES, BLOCK)
            tl.store(losses + row, 0.0)
            return

    a_top = _maximum(a_logits, CLASSES, BLOCK)
    b_top = _maximum(b_logits, CLASSES, BLOCK)
    first_sum, second_sum, rest, first_mean, second_mean, infinite = _sums(
        a_logits, b_logits, a_top, b_top, inverse, SYMMETRIC, CLASSES, BLOCK
    )
    factor = tl.load(scale)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CLASSES, BLOCK):
        a = _load(a_logits, start, CLASSES, BLOCK)
        b = _load(b_logits, start, CLASSES, BLOCK)
        p = tl.exp((a - a_top) * inverse) / first_sum
        q = tl.exp((b - b_top) * inverse) / second_sum
        _, v = _moved(a, b, inverse, a_top - b_top)
        u = v + rest
        small = tl.abs(u) < 1.0
        ph = p * _excess(u)
        pu = p * u
        change = tl.where(small, ph - pu, q - p)
        by_first = p * (v - first_mean)
        by_second = change
        if SYMMETRIC:
            total -= 0.5 * change * u
            by_first -= change
            by_second -= q * (v - second_mean)
        else:
            total += tl.where(small, ph, pu + change)
        if WANT_A:
            _store(by_a, start, by_first * factor, CLASSES, BLOCK)
        if WANT_B:
            _store(by_b, start, by_second * factor, CLASSES, BLOCK)
    loss = tl.sum(total, 0)
    tl.store(losses + row, tl.where(infinite & (loss == loss), float("inf"), loss))
