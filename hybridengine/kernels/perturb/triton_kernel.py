"""The perturbation step in Triton. The formula stands in `reference.py`; computed in float32, rounded once.

A group (a sequence, or a token) lies contiguous, `length` positions of WIDTH numbers. A small one is read once and
stays in registers (`_whole`). Large ones that are many are each read by one program, chunk by chunk, once for every
thing to be known (`_looped`): the second read mostly finds them in the cache. Large ones that are few, or spread over
several sites, are cut into chunks for programs of their own: each writes what it measures of its gradient
(`_measure_gradient`) and of the moved delta (`_measure_moved`), and `_write` combines that in a fixed order. No number
goes to the host. A result depends on nothing outside its group, but for its rounding on which of these ways it goes.
"""

# Triton's functions are typed by what they are called with.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridengine.kernels.dispatch import record

__all__ = ["launch"]

CHUNK = 4096
FEWEST_GROUPS = 64  # about half of what a large GPU runs at a time


@triton.jit
def _scale_of(largest):
    """A power of two that brings `largest` near 1: no square leaves float32, and scaling loses no digit."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)  # its own and its reciprocal's exponent are those of normals
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _measured(x):
    """The largest |x|, infinite if an x is NaN or infinite, and the sum of squares of x times `_scale_of` it."""
    size = tl.abs(x)
    largest = tl.max(tl.where(size < float("inf"), size, float("inf")), 0)
    scaled = x * _scale_of(largest)
    return largest, tl.sum(scaled * scaled, 0)


@triton.jit
def _combined(measures, group, parts, groups, PARTS: tl.constexpr):
    """The measures [2, groups, parts] of a group's chunks as one."""
    part = tl.arange(0, PARTS)
    at = measures + group * parts + part
    sizes = tl.load(at, mask=part < parts, other=0.0)
    squares = tl.load(at + groups.to(tl.int64) * parts, mask=part < parts, other=0.0)
    largest = tl.max(sizes, 0)
    rate = _scale_of(largest) / _scale_of(sizes)  # of powers of two, at most 1: exact, or 0 where it is nothing
    return largest, tl.sum(squares * rate * rate, 0)


@triton.jit
def _load(delta, gradient, mask, group, place, length, WIDTH: tl.constexpr):
    """Delta and gradient of a group at places within it, 0 where the mask drops; where to write, and whether to."""
    inside = place < length * WIDTH
    kept = tl.load(mask + group * length + place // WIDTH, mask=inside, other=0) != 0
    at = group * length * WIDTH + place
    d = tl.load(delta + at, mask=inside & kept, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=inside & kept, other=0.0).to(tl.float32)
    return d, g, at, inside


@triton.jit
def _moved(d, g, largest, squares, step_size, LINF: tl.constexpr):
    if LINF:
        return d + step_size * ((g > 0).to(tl.float32) - (g < 0).to(tl.float32))
    # Scaled so that its largest entry is near 1, a gradient has a norm of 1 at least, or is zero: no step.
    norm = tl.sqrt_rn(squares)
    rate = tl.where(norm > 0, tl.div_rn(step_size, tl.where(norm > 0, norm, 1.0)), 0.0)
    return d + rate * (g * _scale_of(largest))


@triton.jit
def _projected(z, largest, squares, epsilon, LINF: tl.constexpr):
    if LINF:
        return tl.minimum(tl.maximum(z, -epsilon), epsilon)
    norm, limit = tl.sqrt_rn(squares), epsilon * _scale_of(largest)  # both times the scale
    return z * tl.where(norm > limit, tl.div_rn(limit, tl.where(norm > limit, norm, 1.0)), 1.0)


@triton.jit(do_not_specialize=["length"])
def _whole(
    delta, gradient, mask, out, length, step_size, epsilon,
    WIDTH: tl.constexpr, LINF: tl.constexpr, PROJECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A group of at most BLOCK numbers at one site."""
    group = tl.program_id(0).to(tl.int64)
    d, g, at, inside = _load(delta, gradient, mask, group, tl.arange(0, BLOCK), length, WIDTH)
    largest, squares = _measured(g)
    z = _moved(d, g, largest, squares, step_size, LINF)
    if PROJECT:
        reach, moved = _measured(z)
        z = _projected(z, reach, moved, epsilon, LINF)
    result = tl.where(largest < float("inf"), z, d)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _joined(largest, squares, more, more_squares):
    """Two measures as one; the rates are powers of two, at most 1."""
    both = tl.maximum(largest, more)
    rate, more_rate = _scale_of(both) / _scale_of(largest), _scale_of(both) / _scale_of(more)
    return both, squares * rate * rate + more_squares * more_rate * more_rate


@triton.jit(do_not_specialize=["length"])
def _looped(
    delta, gradient, mask, out, length, step_size, epsilon,
    WIDTH: tl.constexpr, LINF: tl.constexpr, PROJECT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A group of any size at one site."""
    group = tl.program_id(0).to(tl.int64)
    largest, squares = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, length * WIDTH, BLOCK):
        _, g, _, _ = _load(delta, gradient, mask, group, start + tl.arange(0, BLOCK), length, WIDTH)
        more, more_squares = _measured(g)
        largest, squares = _joined(largest, squares, more, more_squares)
    reach, sizes = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    if PROJECT and not LINF:
        for start in range(0, length * WIDTH, BLOCK):
            d, g, _, _ = _load(delta, gradient, mask, group, start + tl.arange(0, BLOCK), length, WIDTH)
            more, more_squares = _measured(_moved(d, g, largest, squares, step_size, LINF))
            reach, sizes = _joined(reach, sizes, more, more_squares)
    for start in range(0, length * WIDTH, BLOCK):
        d, g, at, inside = _load(delta, gradient, mask, group, start + tl.arange(0, BLOCK), length, WIDTH)
        z = _moved(d, g, largest, squares, step_size, LINF)
        if PROJECT:
            z = _projected(z, reach, sizes, epsilon, LINF)
        result = tl.where(largest < float("inf"), z, d)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "first", "parts", "groups"])
def _measure_gradient(
    delta, gradient, mask, measures, length, first, parts, groups, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What a chunk says about its gradient, as part `first` + its number."""
    group, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    _, g, _, _ = _load(delta, gradient, mask, group, chunk * BLOCK + tl.arange(0, BLOCK), length.to(tl.int64), WIDTH)
    largest, squares = _measured(g)
    at = measures + group * parts + first + chunk
    tl.store(at, largest)
    tl.store(at + groups.to(tl.int64) * parts, squares)


@triton.jit(do_not_specialize=["length", "first", "parts", "groups"])
def _measure_moved(
    delta, gradient, mask, measures, moved, length, first, parts, groups, step_size,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a chunk says about delta after an L2 step."""
    group, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, g, _, _ = _load(delta, gradient, mask, group, chunk * BLOCK + tl.arange(0, BLOCK), length.to(tl.int64), WIDTH)
    largest, squares = _combined(measures, group, parts, groups, PARTS)
    reach, sizes = _measured(_moved(d, g, largest, squares, step_size, False))
    at = moved + group * parts + first + chunk
    tl.store(at, reach)
    tl.store(at + groups.to(tl.int64) * parts, sizes)


@triton.jit(do_not_specialize=["length", "parts", "groups"])
def _write(
    delta, gradient, mask, out, measures, moved, length, parts, groups, step_size, epsilon,
    WIDTH: tl.constexpr, LINF: tl.constexpr, PROJECT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new delta of a chunk."""
    group, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    d, g, at, inside = _load(delta, gradient, mask, group, place, length.to(tl.int64), WIDTH)
    largest, squares = _combined(measures, group, parts, groups, PARTS)
    z = _moved(d, g, largest, squares, step_size, LINF)
    if PROJECT:
        reach, sizes = largest, squares
        if not LINF:
            reach, sizes = _combined(moved, group, parts, groups, PARTS)
        z = _projected(z, reach, sizes, epsilon, LINF)
    result = tl.where(largest < float("inf"), z, d)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def launch(
    delta: list[Tensor], gradient: list[Tensor], mask: list[Tensor], step_size: float, epsilon: float | None, linf: bool
) -> list[Tensor]:
    """The operator's kernel: checked tensors in, new deltas out."""
    record("perturb", "triton")
    inputs = [[one.contiguous() for one in tensors] for tensors in (delta, gradient)]
    inputs.append([one.contiguous().view(torch.uint8) for one in mask])
    results = [torch.empty_like(one) for one in inputs[0]]
    sites = [site for site in zip(*inputs, results, strict=True) if site[0].numel()]
    with torch.cuda.device_of(results[0]):
        if len(sites) == 1 and _has_groups_of_their_own(sites[0][0]):
            _launch_groups(sites[0], step_size, epsilon, linf)
        elif sites:
            _launch_chunks(sites, step_size, epsilon, linf)
    return results


def _has_groups_of_their_own(delta: Tensor) -> bool:
    """Whether a program takes a whole group: it is small, or there are programs enough; places are of 32 bits."""
    size = delta[0].numel()
    return size <= CHUNK or (len(delta) >= FEWEST_GROUPS and size < 2**31 - CHUNK)


def _launch_groups(site: tuple[Tensor, ...], step_size: float, epsilon: float | None, linf: bool) -> None:
    """A program for each group: small ones at once, others in a loop."""
    groups, length, width = site[0].shape
    is_small = length * width <= CHUNK
    block = triton.next_power_of_2(length * width) if is_small else CHUNK
    kernel: Any = _whole if is_small else _looped
    kernel[(groups,)](
        *site, length, step_size, epsilon or 0.0, WIDTH=width, LINF=linf, PROJECT=epsilon is not None, BLOCK=block,
        num_warps=16 if not is_small else 8 if block > 1024 else 4,
    )  # fmt: skip


def _launch_chunks(sites: list[tuple[Tensor, ...]], step_size: float, epsilon: float | None, linf: bool) -> None:
    groups = sites[0][0].shape[0]
    chunks = [triton.cdiv(site[0][0].numel(), CHUNK) for site in sites]
    parts, starts = sum(chunks), [0, *accumulate(chunks)]
    measures, moved = sites[0][0].new_empty((2, 2, groups, parts), dtype=torch.float32)
    padded = triton.next_power_of_2(parts)
    shapes = [{"WIDTH": site[0].shape[2], "BLOCK": CHUNK, "num_warps": 8} for site in sites]
    work = list(zip(sites, chunks, starts, shapes, strict=False))
    passes: list[Any] = [_measure_gradient, _measure_moved, _write]
    for (*inputs, _), count, first, shape in work:
        passes[0][(groups, count)](*inputs, measures, inputs[0].shape[1], first, parts, groups, **shape)
    for (*inputs, _), count, first, shape in work if epsilon is not None and not linf else ():
        passes[1][(groups, count)](
            *inputs, measures, moved, inputs[0].shape[1], first, parts, groups, step_size, PARTS=padded, **shape
        )
    for site, count, _, shape in work:
        passes[2][(groups, count)](
            *site, measures, moved, site[0].shape[1], parts, groups, step_size, epsilon or 0.0,
            LINF=linf, PROJECT=epsilon is not None, PARTS=padded, **shape,
        )  # fmt: skip
