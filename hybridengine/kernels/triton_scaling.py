"""The Triton kernel of `scaling`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Triton reads the functions as a language of its own, without annotations.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["scale_rows"]

_BLOCK = 4096
# Enough to fill any GPU; more would only each find that there is nothing to do.
_MOST_PROGRAMS = 2048


@triton.jit(do_not_specialize=["rows"])
def _scale(matrix, factor, factor_stride, rows, width, count, BLOCK: tl.constexpr):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        by = tl.load(factor + row * factor_stride)
        if by != 1.0:
            first = tl.cast(row, tl.int64) * width
            for start in range(0, width, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                at = matrix + first + columns
                inside = (columns < width) & (first + columns < count)
                scaled = tl.load(at, mask=inside, other=0.0).to(tl.float32) * by
                tl.store(at, scaled.to(matrix.dtype.element_ty), mask=inside)


def scale_rows(matrix: Tensor, factor: Tensor) -> None:
    """Multiply the rows of `matrix` [N, V], contiguous, of at most 4 bytes a number, by `factor` (a scalar or [N])."""
    factor = factor.float()
    rows, width = matrix.shape
    if factor.dim() == 0:  # one factor for all: cut the memory anew
        rows, width = triton.cdiv(matrix.numel(), _BLOCK), _BLOCK
    stride = factor.stride(0) if factor.dim() else 0
    kernel: Any = _scale
    if matrix.numel():
        with torch.cuda.device_of(matrix):
            kernel[(min(rows, _MOST_PROGRAMS),)](
                matrix, factor, stride, rows, width, matrix.numel(), BLOCK=_BLOCK, num_warps=8
            )
