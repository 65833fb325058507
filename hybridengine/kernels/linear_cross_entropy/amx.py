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
from hybridengine.kernels.linear_cross_entropy.products import Rounded

__all__ = ["Tiles", "matmul"]


def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """Write `a b` into `out`, or add it.

    Args:
        a: [M, K], float32 or bfloat16; of a float32 number 16 bits count, or 8 if it is below 1/64 of the largest in
            its contiguous row or column.
        b: [K, N], bfloat16.
        out: [M, N], rows contiguous, float32, or bfloat16, rounded once.
        accumulate: add, to float32.

    Raises:
        ValueError: for other shapes, dtypes or layouts, and where the CPU has no AMX, or it is not in use
            (`HYBRIDENGINE_ISA`).
    """
    (rows, depth), (of_b, columns) = a.shape, b.shape
    if of_b != depth or out.shape != (rows, columns):
        raise ValueError(f"expected a [M, K], b [K, N] and out [M, N], got {[*a.shape]}, {[*b.shape]}, {[*out.shape]}")
    half, single = torch.bfloat16, torch.float32
    if a.dtype not in (half, single) or b.dtype != half or out.dtype not in (half, single):
        raise ValueError(
            f"expected a and out in float32 or bfloat16, b in bfloat16, got {a.dtype}, {out.dtype}, {b.dtype}"
        )
    if columns > 1 and out.stride(1) != 1:
        raise ValueError(f"expected out with contiguous rows, got strides {out.stride()}")
    a, b = _with_lines(a), _with_lines(b)  # copies live until the call returns
    result = native.ELEMENT_TYPES[out.dtype], out.data_ptr(), out.stride(0)
    native.module().matmul(_operand(a), _operand(b), rows, columns, depth, result, accumulate)


def _with_lines(matrix: Tensor) -> Tensor:
    """The matrix with its rows or its columns contiguous."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _operand(matrix: Tensor) -> tuple[int, int, int, int]:
    rows, columns = matrix.stride()
    if 1 not in (rows, columns):  # a single number
        rows = columns = 1
    return native.ELEMENT_TYPES[matrix.dtype], matrix.data_ptr(), rows, columns


class Tiles(Rounded):
    """Of a bfloat16 head; another one is rounded, as torch's autocast does."""

    gradient_dtype = None

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.bfloat16, factor: float = 1.0) -> None:
        """As `Rounded`; there is no factor to take out of a gradient that is not rounded."""
        assert factor == 1.0
        super().__init__(weight, dtype)

    @cached_property
    def weight(self) -> Tensor:
        """The head in bfloat16, copied once."""
        if self._given.dtype == self.dtype:
            return _with_lines(self._given)
        return native.empty(tuple(self._given.shape), self.dtype).copy_(self._given)

    def rows(self, x: Tensor) -> Tensor:
        """`x` in bfloat16."""
        return _with_lines(x.to(self.dtype))

    def _add(self, out: Tensor, a: Tensor, b: Tensor, *, first: bool, factor: float) -> None:
        matmul(a, b, out, accumulate=not first)
