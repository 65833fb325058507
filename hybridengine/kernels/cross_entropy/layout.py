"""What the GPU kernels take: dtypes and layouts of the tensors, and the flag for a label that is no class.

A kernel cannot refuse a label without making the host wait. It treats the row as ignored and notes the first such label
in a flag on the device, which the host looks at when it waits anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy.options import bad_label, is_soft

__all__ = ["ROW_DTYPES", "check_rows", "check_values", "new_flag", "raise_if_set"]

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(logits: Tensor, target: Tensor, weight: Tensor | None, gradient: Tensor | None) -> None:
    """Refuse what a kernel would read or write wrongly.

    Raises:
        ValueError: naming the tensor, what it is and what was expected.
    """
    if logits.dim() != 2 or logits.dtype not in ROW_DTYPES or not _rows_are_contiguous(logits):
        raise ValueError(f"logits must be [N, V] with contiguous rows of {ROW_DTYPES}, got {_describe(logits)}")
    rows, classes = logits.shape
    if rows >= 2**31 or classes >= 2**31 - 65536:
        raise ValueError(f"logits have more rows or classes than 31 bits count: {_describe(logits)}")
    if is_soft(target):
        if target.shape != logits.shape or target.dtype not in (torch.float32, logits.dtype):
            raise ValueError(f"soft targets must be float32 or {logits.dtype}, [N, V], got {_describe(target)}")
        if not _rows_are_contiguous(target):
            raise ValueError(f"soft targets must have contiguous rows, got {_describe(target)}")
    elif target.shape != (rows,) or target.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{rows}], got {_describe(target)}")
    if weight is not None and (
        weight.shape != (classes,) or weight.dtype != torch.float32 or not weight.is_contiguous()
    ):
        raise ValueError(f"weight must be contiguous float32 [{classes}], got {_describe(weight)}")
    if gradient is not None and (
        gradient.shape != logits.shape or gradient.dtype not in ROW_DTYPES or not _rows_are_contiguous(gradient)
    ):
        raise ValueError(f"the gradient must be [N, V] with contiguous rows of {ROW_DTYPES}, got {_describe(gradient)}")


def check_values(rows: int, *values: Tensor | None) -> None:
    """Refuse what is not one float32 for each row, side by side. An expanded gradient is not.

    Raises:
        ValueError: telling what the tensor is.
    """
    for one in values:
        if one is not None and (one.shape != (rows,) or one.dtype != torch.float32 or not one.is_contiguous()):
            raise ValueError(f"expected contiguous float32 [{rows}], got {_describe(one)}")


def _rows_are_contiguous(matrix: Tensor) -> bool:
    return matrix.shape[1] <= 1 or matrix.stride(1) == 1


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"


def new_flag(device: torch.device | str) -> Tensor:
    """Return a flag of three int64 for `forward`, unset."""
    return torch.zeros(3, dtype=torch.int64, device=device)


def raise_if_set(flag: Tensor, ignore_index: int) -> None:
    """Raise for the label that a kernel noted in `flag`; waits for the device.

    Raises:
        IndexError: names row, label and number of classes, as the CPU kernel does.
    """
    number, label, classes = flag.tolist()
    if number:
        raise IndexError(bad_label(number - 1, label, classes, ignore_index))
