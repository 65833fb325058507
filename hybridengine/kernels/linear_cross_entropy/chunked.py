"""Loss and gradients from a few rows of logits at a time, in one pass over the rows.

Each chunk is multiplied by the head, turned into its own gradient and multiplied back, so that the logits of all rows
never exist (on a GPU their gradient may, in half precision). Sums over chunks, above all the head's gradient, are kept
in float32 (float64 for float64) and rounded once at the end: the result depends on the number of rows in a chunk only
through the order of those sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.linear_cross_entropy.chunks import rows_of_logits
from hybridengine.kernels.linear_cross_entropy.memory import empty, matrix
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
    chunks = list(_chunks(rows, index, chunk_rows))
    memory = _Memory(classes, products, any(wanted), dtype, head.x.device)
    sums = _Sums(head, products, wanted, index is None, len(chunks), dtype)
    for at in chunks:
        x, target = products.rows(head.x[at]), head.target[at].contiguous()
        coming = _of(by_loss, at), _of(by_lse, at)
        chunk_loss, chunk_lse = (torch.empty(len(x), dtype=dtype, device=x.device) for _ in range(2))
        gradient = memory.gradient(len(x))
        for part in memory.parts(len(x)):
            logits = memory.logits(part.stop - part.start)
            products.logits(x[part], head.bias, logits)
            kernel(
                logits,
                target[part],
                loss=chunk_loss[part],
                lse=chunk_lse[part],
                gradient=None if gradient is None else gradient[part],
                by_loss=_of(coming[0], part),
                by_lse=_of(coming[1], part),
            )
        loss[at], lse[at] = chunk_loss, chunk_lse
        if gradient is not None:
            sums.add(at, x, gradient)
    return loss, lse, sums.result()


def _of(rows: Tensor | None, at: slice | Tensor) -> Tensor | None:
    """A part of what comes in for the rows; a scalar is for every row."""
    return rows if rows is None or rows.dim() == 0 else rows[at].contiguous()


def _chunks(rows: int, index: Tensor | None, size: int) -> Iterator[slice | Tensor]:
    if index is not None:
        yield from torch.split(index, size) if len(index) else ()
        return
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _Memory:
    """The memory of a chunk's logits and of their gradient, used again by every chunk; the first one is the largest.

    The gradient takes the place of the logits. Where it is rounded it has memory of its own, and the logits are made
    for a part of the chunk at a time: the products of the gradient get many rows, while the wide logits stay few.
    """

    def __init__(
        self, classes: int, products: Products, with_gradient: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.classes, self.dtype, self.device = classes, dtype, device
        self.with_gradient, self.gradient_dtype = with_gradient, products.gradient_dtype
        self._logits: Tensor | None = None
        self._gradient: Tensor | None = None

    def parts(self, rows: int) -> list[slice]:
        """The rows of a chunk whose logits exist at a time."""
        size = rows if self.gradient_dtype is None else rows_of_logits(self.classes)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def logits(self, rows: int) -> Tensor:
        """Memory for the logits of so many rows."""
        if self._logits is None:
            self._logits = matrix(rows, self.classes, self.dtype, self.device)
        return self._logits[:rows]

    def gradient(self, rows: int) -> Tensor | None:
        """Memory for the gradient of a chunk's logits, or None if nobody wants it."""
        if not self.with_gradient:
            return None
        if self.gradient_dtype is None:
            return self.logits(rows)
        if self._gradient is None:
            self._gradient = matrix(rows, self.classes, self.gradient_dtype, self.device)
        return self._gradient[:rows]


class _Sums:
    """The gradients while chunks are added to them."""

    def __init__(
        self, head: Head, products: Products, wanted: Wanted, every_row: bool, chunks: int, dtype: torch.dtype
    ) -> None:
        self.head, self.products = head, products
        self.x = self.weight = self.bias = None
        if wanted.x:
            make = torch.empty_like if every_row else torch.zeros_like
            self.x = make(head.x, memory_format=torch.contiguous_format)
        if wanted.weight:
            # One product is rounded by itself; sums of several are kept wide.
            kept = products.out_dtype(head.weight.dtype) if chunks == 1 else dtype
            self.weight = empty(tuple(head.weight.shape), kept, head.x.device)
        if wanted.bias:
            self.bias = torch.zeros(len(head.weight), dtype=dtype, device=head.x.device)
        self.started = False

    def add(self, at: slice | Tensor, x: Tensor, gradient: Tensor) -> None:
        """Add what a chunk of rows `x` with the gradient of its logits contributes."""
        if self.x is not None:
            self.x[at] = self.products.of_x(gradient, self.x.dtype).to(self.x.dtype)
        if self.weight is not None:
            self.products.add_of_weight(self.weight, gradient, x, first=not self.started)
        if self.bias is not None:
            self.bias += self.products.of_bias(gradient)
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
