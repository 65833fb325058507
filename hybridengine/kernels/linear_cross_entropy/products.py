"""The three products of matrices around a chunk of logits, all summed and returned in float32 (float64 for float64).

`Wide` multiplies wide numbers; half-precision tensors are widened first, the head block by block: products of bfloat16
numbers are exact in float32. `Half` leaves the multiplication of half-precision numbers to a GPU's tensor cores, which
sum in float32; the gradient of the logits is rounded for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Half", "Products", "Wide"]


class Products(Protocol):
    """How a chunk is multiplied. `x` [B, H] is what `rows` returned."""

    def rows(self, x: Tensor) -> Tensor:
        """The rows of a chunk as they are multiplied."""

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write `x W^T + bias` [B, V], wide, into `out`."""

    def gradient(self, logits: Tensor) -> Tensor:
        """The gradient of a chunk's logits as it is multiplied."""

    def of_x(self, gradient: Tensor) -> Tensor:
        """`gradient W` [B, H], wide."""

    def add_of_weight(self, total: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        """Add `gradient^T x` to `total` [V, H], wide; or write it, if it is the first."""


class Wide:
    """Products of wide numbers."""

    # Classes of a half-precision head that are widened at a time.
    _BLOCK = 4096

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def rows(self, x: Tensor) -> Tensor:
        """`x`, widened."""
        return x.to(self.dtype)

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Block by block."""
        for at, block in self._blocks():
            torch.mm(x, block.t(), out=out[:, at])
        if bias is not None:
            out += bias

    def gradient(self, logits: Tensor) -> Tensor:
        """As it is."""
        return logits

    def of_x(self, gradient: Tensor) -> Tensor:
        """The sum over the blocks."""
        total: Tensor | None = None
        for at, block in self._blocks():
            part = gradient[:, at]
            total = part @ block if total is None else torch.addmm(total, part, block, out=total)
        assert total is not None
        return total

    def add_of_weight(self, total: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        """In place."""
        torch.addmm(total, gradient.t(), x, beta=0 if first else 1, out=total)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The head: whole where it is wide, otherwise widened block by block."""
        if self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        for start in range(0, len(self.weight), self._BLOCK):
            at = slice(start, start + self._BLOCK)
            yield at, self.weight[at].to(self.dtype)


class Half:
    """Products of half-precision numbers on a GPU."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """`dtype`: bfloat16 or float16, in which everything is multiplied."""
        self.weight, self.dtype = weight.to(dtype), dtype

    def rows(self, x: Tensor) -> Tensor:
        """`x` in half precision."""
        return x.to(self.dtype)

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """In one product."""
        self._product(x, self.weight.t(), out, first=True)
        if bias is not None:
            out += bias

    def gradient(self, logits: Tensor) -> Tensor:
        """Rounded."""
        return logits.to(self.dtype)

    def of_x(self, gradient: Tensor) -> Tensor:
        """In one product."""
        out = gradient.new_empty(len(gradient), self.weight.shape[1], dtype=torch.float32)
        self._product(gradient, self.weight, out, first=True)
        return out

    def add_of_weight(self, total: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        """In place."""
        self._product(gradient.t(), x, total, first)

    def _product(self, a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
        if first:
            torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
