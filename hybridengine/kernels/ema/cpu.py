"""The moving average on the CPU by the native library: `csrc/ema/`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.keep import cpu as keep
from hybridengine.kernels.keep.kept import mark_changed

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(averages: list[Tensor], weights: list[Tensor]) -> str | None:
    """Say why these tensors cannot run here."""
    for average, weight in zip(averages, weights, strict=True):
        if average.dtype not in (torch.float32, torch.float64):
            return f"an average is float32 or float64, got {average.dtype}"
        if weight.dtype != average.dtype and (average.dtype, weight.dtype) != (torch.float32, torch.bfloat16):
            return f"a weight is of the average's dtype, or bfloat16 beside float32; got {weight.dtype}"
        if weight.device.type != "cpu" or weight.layout != torch.strided:
            return "a weight is not a dense one on the CPU"
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return "it has no rule for torch.func transforms"
    return keep.why_not(averages)


def run(averages: list[Tensor], weights: list[Tensor], rate: float) -> None:
    """Update the averages in place."""
    record("ema", "cpu")
    sources = [weight.contiguous() for weight in weights]  # alive until the library has read them
    tensors = [
        (native.ELEMENT_TYPES[a.dtype], native.ELEMENT_TYPES[w.dtype], a.data_ptr(), w.data_ptr(), a.numel())
        for a, w in zip(averages, sources, strict=True)
    ]
    native.module().ema_update(tensors, rate)
    mark_changed(averages)
