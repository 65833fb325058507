"""The three products of matrices around a chunk of logits, all summed in float32 (float64 for float64).

`Wide` multiplies wide numbers; half-precision tensors are widened first, the head block by block: products of bfloat16
numbers are exact in float32. `Narrow` leaves half-precision numbers to a GPU's tensor cores, which sum in float32; the
gradient of the logits is rounded for them. `amx.Tiles` are a CPU's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

__all__ = ["Narrow", "Products", "Rounded", "Wide", "write_of_weight"]


class Products(Protocol):
    """How a chunk is multiplied. `x` [B, H] is what `rows` returned."""

    @property
    def gradient_dtype(self) -> torch.dtype | None:
        """What the gradient of the logits is multiplied in; None: as the logits are, in their place."""

    def of_classes(self, at: slice) -> Products:
        """The same for a block of classes."""

    def rows(self, x: Tensor) -> Tensor:
        """The rows of a chunk as they are multiplied."""

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write `x W^T + bias` [B, V], wide, into `out`."""

    @property
    def factor(self) -> float:
        """What multiplies the three gradients, so that the gradient of the logits comes without it."""

    def of_x(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """`gradient W` [B, H], wide or in `dtype`, rounded once."""

    def add_of_x(self, total: Tensor, gradient: Tensor, first: bool) -> None:
        """Add `gradient W` to `total` [B, H], wide; or write it, if it is the first."""

    def add_of_weight(self, total: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        """Add `gradient^T x` to `total` [V, H], wide; or write it, if it is the first, also as `out_dtype` says."""

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return in what the only product of a result in `dtype` can be written."""

    def of_bias(self, gradient: Tensor) -> Tensor:
        """The sum of the rows of `gradient`, wide."""


class Wide:
    """Products of wide numbers."""

    # Classes of a half-precision head that are widened at a time.
    _BLOCK = 4096

    gradient_dtype = None
    factor = 1.0

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype

    def of_classes(self, at: slice) -> Wide:
        """Of a part of the head."""
        return Wide(self.weight[at], self.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """`x`, widened."""
        return x.to(self.dtype)

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Block by block."""
        for at, block in self._blocks():
            torch.mm(x, block.t(), out=out[:, at])
        if bias is not None:
            out += bias

    def of_x(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over the blocks, wide."""
        total = gradient.new_empty(len(gradient), self.weight.shape[1])
        self.add_of_x(total, gradient, first=True)
        return total

    def add_of_x(self, total: Tensor, gradient: Tensor, first: bool) -> None:
        """Block by block."""
        for number, (at, block) in enumerate(self._blocks()):
            torch.addmm(total, gradient[:, at], block, beta=0 if first and number == 0 else 1, out=total)

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Wide."""
        return self.dtype

    def add_of_weight(self, total: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        """In place."""
        torch.addmm(total, gradient.t(), x, beta=0 if first else 1, out=total)

    def of_bias(self, gradient: Tensor) -> Tensor:
        """In one sum."""
        return gradient.sum(0)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The head: whole where it is wide, otherwise widened block by block."""
        if self.weight.dtype == self.dtype:
            yield slice(None), self.weight
            return
        for start in range(0, len(self.weight), self._BLOCK):
            at = slice(start, start + self._BLOCK)
            yield at, self.weight[at].to(self.dtype)


class Rounded(ABC):
    """Products of half-precision numbers, each in one call: what differs is who multiplies."""

    gradient_dtype: torch.dtype | None

    def __init__(self, weight: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
        """Say how to multiply.

        Args:
            weight: the head.
            dtype: in which everything is multiplied, bfloat16 or float16.
            factor: what multiplies the three gradients.
        """
        self.factor, self.dtype = factor, dtype
        self._given = weight

    @abstractmethod
    def _add(self, out: Tensor, a: Tensor, b: Tensor, *, first: bool, factor: float) -> None:
        """Write `factor a b`, or add it."""

    @cached_property
    def weight(self) -> Tensor:
        """The head in half precision."""
        return self._given.to(self.dtype)

    def of_classes(self, at: slice) -> Self:
        """Of a part of the head."""
        return type(self)(self._given[at], self.dtype, self.factor)

    def rows(self, x: Tensor) -> Tensor:
        """`x` in half precision."""
        return x.to(self.dtype)

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """In one product."""
        self._add(out, x, self.weight.t(), first=True, factor=1.0)
        if bias is not None:
            out += bias

    def of_x(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """In one product, rounded by it."""
        out = gradient.new_empty(len(gradient), self.weight.shape[1], dtype=self.out_dtype(dtype))
        self.add_of_x(out, gradient, first=True)
        return out

    def add_of_x(self, total: Tensor, gradient: Tensor, first: bool) -> None:
        """In one product."""
        self._add(total, gradient, self.weight, first=first, factor=self.factor)

    def add_of_weight(self, total: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        """In place; `total` is float32, or as `out_dtype` says where this is all of it."""
        self._add(total, gradient.t(), x, first=first, factor=self.factor)

    def of_bias(self, gradient: Tensor) -> Tensor:
        """In one sum."""
        return gradient.sum(0, dtype=torch.float32) * self.factor

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return in what a product for a result in `dtype` is written: the dtype of the products, or float32."""
        return dtype if dtype == self.dtype else torch.float32


class Narrow(Rounded):
    """A GPU's: of the gradient of the logits in half precision.

    The gradient of the logits comes without the factor 1/N of a mean, which multiplies the sums: rounded, p - 1 of a
    label stays -1 where p is small, while (p - 1)/N would carry the rounding error of 1/N into every row alike.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
        """As `Rounded`."""
        super().__init__(weight, dtype, factor)
        self.gradient_dtype = dtype

    def _add(self, out: Tensor, a: Tensor, b: Tensor, *, first: bool, factor: float) -> None:
        beta = 0.0 if first else 1.0
        if out.dtype == a.dtype:
            torch.addmm(out, a, b, beta=beta, alpha=factor, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=factor, out=out)


def write_of_weight(products: Products, out: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Write `gradient^T x` into `out`, part of the head's gradient, rounded once."""
    written = products.out_dtype(out.dtype)
    wide = out if written == out.dtype else torch.empty(out.shape, dtype=written, device=out.device)
    products.add_of_weight(wide, gradient, x, first=True)
    if wide is not out:
        out.copy_(wide)
