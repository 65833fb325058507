"""Loss and gradients from a few classes at a time (`mode="low_memory"`): two passes over the head.

The first pass finds each row's maximum M and sum S = sum_j exp(y_j - M), the second computes the same logits again and
turns them into their gradient. A block's part of the head's gradient is then complete at once and is rounded into
place: no float32 copy of the whole exists. Beside the gradients there are a few N x (classes in a block) matrices and
one N x H. The price is a fourth product of matrices. The passes here are plain torch around `Products`; a GPU has its
own (`gpu_blocked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy.derivatives import slope_of
from hybridengine.kernels.cross_entropy.options import Options, is_soft
from hybridengine.kernels.cross_entropy.reference import capped
from hybridengine.kernels.linear_cross_entropy.memory import matrix
from hybridengine.kernels.linear_cross_entropy.products import Products, write_of_weight
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, Wanted
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["classes_per_block", "run"]

Passes = Callable[..., tuple[Tensor, Tensor, Gradients]]

_BYTES = 32 << 20  # of one N x block matrix
_FEWEST = 512
_LARGEST_PART = 8  # of all classes


def classes_per_block(rows: int, classes: int) -> int:
    """Return how many classes are computed at a time."""
    fitting = min(_BYTES // (4 * max(rows, 1)), -(-classes // _LARGEST_PART))
    return min(max(fitting, _FEWEST), max(classes, 1))


class _Rows(NamedTuple):
    """What the first pass finds, [N] each."""

    maximum: Tensor  # M
    total: Tensor  # S
    mass: Tensor  # h
    expected: Tensor  # sum_j q_j y_j


def run(
    products: Products,
    head: Head,
    index: Tensor | None,
    options: Options,
    block: int,
    wanted: Wanted,
    factors: tuple[float | Tensor, float | Tensor],
    by_loss: Tensor | None = None,
    by_lse: Tensor | None = None,
    passes: Passes | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Return row losses [N], log-sum-exps [N] and gradients.

    Args:
        products: with the head.
        head: the tensors.
        index: the rows that count (`counted_rows`); the others get zeros and cost nothing.
        options: as in `cross_entropy`.
        block: classes at a time.
        wanted: whose gradients.
        factors: of each row's loss and z term.
        by_loss: what comes in for the row losses, a scalar or [N]; None: 1.
        by_lse: what comes in for the log-sum-exps, [N]; None: 0.
        passes: who makes the two passes over rows that all count; None: plain torch.
    """
    passes = passes or partial(_run, products)
    if index is None:
        return passes(head, options, block, wanted, factors, by_loss, by_lse)
    by_loss, by_lse = (one if one is None or one.dim() == 0 else one[index] for one in (by_loss, by_lse))
    counted = head._replace(x=head.x[index], target=head.target[index])
    loss, lse, gradients = passes(counted, options, block, wanted, factors, by_loss, by_lse)
    whole = [one.new_zeros(len(head.x)).index_copy(0, index, one) for one in (loss, lse)]
    by_x = (
        None
        if gradients.x is None
        else torch.zeros_like(head.x, memory_format=torch.contiguous_format).index_copy(0, index, gradients.x)
    )
    return whole[0], whole[1], gradients._replace(x=by_x)


def _run(
    products: Products,
    head: Head,
    options: Options,
    block: int,
    wanted: Wanted,
    factors: tuple[float | Tensor, float | Tensor],
    by_loss: Tensor | None,
    by_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Gradients]:
    dtype = accumulator_dtype(head.x.dtype)
    logits = _Logits(products, head, block, dtype)
    rows = _first_pass(logits, head, options)
    log_total = rows.total.log()
    lse = rows.maximum + log_total
    # h (M + log S) - sum q y, with the maximum taken from both first: logits may be around 1e30.
    loss = (rows.mass * rows.maximum - rows.expected) + rows.mass * log_total
    loss = factors[0] * loss + factors[1] * options.z_loss * lse.square()
    if not any(wanted):
        return loss, lse, Gradients(None, None, None)
    one = torch.ones((), dtype=dtype, device=head.x.device)
    g = (one if by_loss is None else by_loss.to(dtype)).expand(len(head.x))
    of_p = g * (factors[0] * rows.mass + 2 * options.z_loss * factors[1] * lse)
    of_p = (of_p if by_lse is None else of_p + by_lse.to(dtype)) / rows.total
    parts = (one.unsqueeze(-1) for one in (rows.maximum, of_p, g * factors[0]))
    return loss, lse, _second_pass(logits, head, options, wanted, *parts)


class _Logits:
    """The logits before scale and softcap, some classes at a time, in the same memory."""

    def __init__(self, products: Products, head: Head, block: int, dtype: torch.dtype) -> None:
        self.products, self.head, self.block = products, head, block
        self.x = products.rows(head.x)
        self.memory = matrix(len(self.x), min(block, len(head.weight)), dtype, self.x.device)

    def __iter__(self) -> Iterator[tuple[slice, Products, Tensor]]:
        for start in range(0, len(self.head.weight), self.block):
            at = slice(start, min(start + self.block, len(self.head.weight)))
            products, logits = self.products.of_classes(at), self.memory[:, : at.stop - at.start]
            products.logits(self.x, None if self.head.bias is None else self.head.bias[at], logits)
            yield at, products, logits


def _targets(head: Head, options: Options, at: slice, dtype: torch.dtype) -> Tensor:
    """The targets q of a block of classes, [N, block]."""
    classes = len(head.weight)
    if is_soft(head.target):
        q = head.target[:, at].to(dtype) * (1.0 - options.label_smoothing) + options.label_smoothing / classes
    else:
        q = head.x.new_full((len(head.x), at.stop - at.start), options.label_smoothing / classes, dtype=dtype)
        inside = ((head.target >= at.start) & (head.target < at.stop)).nonzero().squeeze(-1)
        q[inside, head.target[inside] - at.start] += 1.0 - options.label_smoothing
    return q if head.class_weight is None else q.mul_(head.class_weight[at].to(dtype))


def _first_pass(blocks: _Logits, head: Head, options: Options) -> _Rows:
    dtype = blocks.memory.dtype
    maximum = head.x.new_full((len(head.x),), -torch.inf, dtype=dtype)
    total, mass, expected = (torch.zeros_like(maximum) for _ in range(3))
    for at, _, logits in blocks:
        y, q = capped(logits, options), _targets(head, options, at, dtype)
        mass += q.sum(1)
        expected += torch.where(q == 0, 0, q * y).sum(1)
        larger = torch.maximum(maximum, y.amax(1))
        shift = torch.where(larger == -torch.inf, 0, larger)  # of classes that are all impossible so far
        total = total * (maximum - shift).exp() + (y - shift.unsqueeze(1)).exp_().sum(1)
        maximum = larger
    return _Rows(maximum, total, mass, expected)


def _second_pass(
    blocks: _Logits, head: Head, options: Options, wanted: Wanted, maximum: Tensor, of_p: Tensor, of_q: Tensor
) -> Gradients:
    """The gradients from G = y' (of_p exp(y - maximum) - of_q q), all [N, 1]."""
    dtype, device = blocks.memory.dtype, head.x.device
    by_x = torch.zeros(head.x.shape, dtype=dtype, device=device) if wanted.x else None
    by_weight = torch.empty_like(head.weight, memory_format=torch.contiguous_format) if wanted.weight else None
    by_bias = torch.empty_like(head.bias) if wanted.bias and head.bias is not None else None
    for at, products, logits in blocks:
        y = capped(logits, options)
        g = (y - maximum).exp_().mul_(of_p) - _targets(head, options, at, dtype).mul_(of_q)
        if options.softcap or options.scale != 1.0:
            g.mul_(slope_of(y, options))
        if by_x is not None:
            products.add_of_x(by_x, g, first=False)
        if by_weight is not None:
            write_of_weight(products, by_weight[at], g, blocks.x)
        if by_bias is not None:
            by_bias[at] = g.sum(0).to(by_bias.dtype)
    return Gradients(None if by_x is None else by_x.to(head.x.dtype), by_weight, by_bias)
