"""Memory for the numbers that a loss needs for a while."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels import native

__all__ = ["empty", "matrix"]

_ALIGNED = 16


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a tensor; on a CPU from the pool of huge pages."""
    return native.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a matrix; on a GPU each row begins at a multiple of 16 numbers, as fast products want it."""
    if device.type == "cpu":
        return empty((rows, columns), dtype, device)
    return torch.empty(rows, -(-columns // _ALIGNED) * _ALIGNED, dtype=dtype, device=device)[:, :columns]
