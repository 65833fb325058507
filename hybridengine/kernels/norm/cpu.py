"""The total norm on the CPU by the native library: `csrc/norm/`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.dispatch import record

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """Say why these tensors cannot be read here."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return "a tensor is not a dense one on the CPU"
        if tensor.dtype not in native.ELEMENT_TYPES:
            return f"it takes float32, bfloat16 and float64, got {tensor.dtype}"
        if not tensor.is_contiguous():
            return "a tensor is not contiguous"
    return None


def run(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm, float64."""
    record("total_norm", "cpu")
    parts = [(native.ELEMENT_TYPES[t.dtype], t.data_ptr(), t.numel()) for t in tensors]
    return torch.full((), native.module().total_norm(parts), dtype=torch.float64)
