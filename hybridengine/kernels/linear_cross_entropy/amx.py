"""Products of bfloat16 matrices in the tiles (AMX) of a CPU, summed in float32 by the native library.

torch multiplies bfloat16 matrices there many times faster than float32 ones, but rounds every result to bfloat16. Here
results are float32, and the float32 gradient of the logits is not rounded either: it is multiplied as the sum of two
bfloat16 numbers.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from hybridengine.kernels import native

__all__ = ["Tiles", "matmul"]


def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write `a b` into `out`, or add it.

    Args:
        a: [M, K], float32 or bfloat16; of a float32 number 16 bits count.
        b: [K, N], bfloat16.
        out: [M, N], rows contiguous, float32, or bfloat16, rounded once.
        accumulate: add, to float32.

    Raises:
        ValueError: where the CPU has no AMX, or it is not in use (`HYBRIDENGINE_ISA`).
    """
    rows, depth = a.shape
    result = native.ELEMENT_TYPES[out.dtype], out.data_ptr(), out.stride(0)
    native.module().matmul(_operand(a), _operand(b), rows, b.shape[1], depth, result, accumulate)


def _operand(matrix: Tensor) -> tuple[int, int, int, int]:
    if 1 not in matrix.stride():
        matrix = matrix.contiguous()
    return native.ELEMENT_TYPES[matrix.dtype], matrix.data_ptr(), matrix.stride(0), matrix.stride(1)


class Tiles:
    """Products of a bfloat16 head; another one is rounded, as torch's autocast does."""

    gradient_dtype = None
    factor = 1.0

    def __init__(self, weight: Tensor) -> None:
        self._given = weight

    @cached_property
    def weight(self) -> Tensor:
        """The head in bfloat16."""
        if self._given.dtype == torch.bfloat16:
            return self._given
        return native.empty(tuple(self._given.shape), torch.bfloat16).copy_(self._given)

    def of_classes(self, at: slice) -> Tiles:
        """Of a part of the head."""
        return Tiles(self._given[at])

    def rows(self, x: Tensor) -> Tensor:
        """`x` in bfloat16."""
        return x.to(torch.bfloat16)

    def logits(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """In one product."""
        matmul(x, self.weight.t(), out)
        if bias is not None:
            out += bias

    def of_x(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """In one product, rounded by it."""
        total = gradient.new_empty(len(gradient), self.weight.shape[1], dtype=self.out_dtype(dtype))
        self.add_of_x(total, gradient, first=True)
        return total

    def add_of_x(self, total: Tensor, gradient: Tensor, first: bool) -> None:
        """In one product."""
        matmul(gradient, self.weight, total, accumulate=not first)

    def add_of_weight(self, total: Tensor, gradient: Tensor, x: Tensor, first: bool) -> None:
        """In one product."""
        matmul(gradient.t(), x, total, accumulate=not first)

    def out_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return in what a product for a result in `dtype` is written."""
        return dtype if dtype == torch.bfloat16 else torch.float32

    def of_bias(self, gradient: Tensor) -> Tensor:
        """In one sum."""
        return gradient.sum(0)
