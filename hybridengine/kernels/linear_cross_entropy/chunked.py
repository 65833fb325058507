"""Loss and gradients from a few rows of logits at a time, in one pass over the rows.

Each chunk is multiplied by the head, turned into its own gradient in place, and multiplied back, so that the logits of
all rows never exist. Sums over chunks, above all the head's gradient, are kept in float32 (float64 for float64) and
rounded once at the end: the result depends on the number of rows in a chunk only through the order of those sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.linear_cross_entropy.products import Products
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, RowKernel, Wanted

__all__ = ["run"]


def run(
    kernel: RowKernel,
    products: Products,
    head: Head,
    index: Tensor | None,
    chunk_rows: int,
    wanted: Wanted,
    by_loss: Tensor | None = None,
    by_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Return row losses [N], log-sum-exps [N] and gradients.

    Args:
        kernel: cross-entropy of a chunk.
        products: with the head.
        head: the tensors.
        index: the rows that count (`counted_rows`); the others get zeros and cost nothing.
        chunk_rows: rows of logits at a time.
        wanted: whose gradients.
        by_loss: what comes in for the row losses, a scalar or [N]; None: 1.
        by_lse: what comes in for the log-sum-exps, [N]; None: 0.
    """
    dtype = native.accumulator_dtype(head.x.dtype)
    rows, classes = len(head.x), len(head.weight)
    loss = torch.zeros(rows, dtype=dtype, device=head.x.device)
    lse = torch.zeros_like(loss)
    sums = _Sums(head, wanted, index is None, dtype)
    for at in _chunks(rows, index, chunk_rows):
        x, target = products.rows(head.x[at]), head.target[at].contiguous()
        logits = sums.buffer(len(x), classes)
        products.logits(x, head.bias, logits)
        chunk_loss, chunk_lse = (torch.empty(len(x), dtype=dtype, device=x.device) for _ in range(2))
        kernel(
            logits,
            target,
            loss=chunk_loss,
            lse=chunk_lse,
            want_gradient=any(wanted),
            by_loss=by_loss[at].contiguous() if by_loss is not None and by_loss.dim() else by_loss,
            by_lse=None if by_lse is None else by_lse[at].contiguous(),
        )
        loss[at], lse[at] = chunk_loss, chunk_lse
        if any(wanted):
            sums.add(at, x, products.gradient(logits), products)
    return loss, lse, sums.result()


def _chunks(rows: int, index: Tensor | None, size: int) -> Iterator[slice | Tensor]:
    if index is not None:
        yield from torch.split(index, size) if len(index) else ()
        return
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _Sums:
    """The gradients while chunks are added to them, and the memory of a chunk's logits."""

    def __init__(self, head: Head, wanted: Wanted, every_row: bool, dtype: torch.dtype) -> None:
        self.head = head
        self.dtype = dtype
        self.chunk: Tensor | None = None
        self.x = self.weight = self.bias = None
        if wanted.x:
            make = torch.empty_like if every_row else torch.zeros_like
            self.x = make(head.x, memory_format=torch.contiguous_format)
        if wanted.weight:
            self.weight = _empty(tuple(head.weight.shape), dtype, head.x.device)
        if wanted.bias:
            self.bias = torch.zeros(len(head.weight), dtype=dtype, device=head.x.device)
        self.started = False

    def buffer(self, rows: int, classes: int) -> Tensor:
        """Memory for a chunk's logits; the first chunk is the largest."""
        if self.chunk is None:
            self.chunk = _empty((rows, classes), self.dtype, self.head.x.device)
        return self.chunk[:rows]

    def add(self, at: slice | Tensor, x: Tensor, gradient: Tensor, products: Products) -> None:
        """Add what a chunk of rows `x` with the gradient of its logits contributes."""
        if self.x is not None:
            self.x[at] = products.of_x(gradient).to(self.x.dtype)
        if self.weight is not None:
            products.add_of_weight(self.weight, gradient, x, first=not self.started)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.dtype)
        self.started = True

    def result(self) -> Gradients:
        """The gradients, rounded once."""
        if self.weight is not None and not self.started:
            self.weight.zero_()
        return Gradients(
            self.x,
            None if self.weight is None else self.weight.to(self.head.weight.dtype),
            None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype),
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return native.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
