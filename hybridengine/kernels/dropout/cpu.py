"""Dropout on the CPU by the native library: `csrc/dropout/`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.dropout.reference import scale, threshold
from hybridengine.kernels.modes import why_not_transformed

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(x: Tensor, p: float, seed: int | None) -> str | None:
    """Say why these arguments cannot run here."""
    if x.device.type != "cpu":
        return "the tensor is not on the CPU"
    if x.dtype not in native.ELEMENT_TYPES:
        return f"it takes float32, bfloat16 and float64, got {x.dtype}"
    return why_not_transformed(x)


class _Dropout(torch.autograd.Function):
    """Linear in `x`: the gradient is the same function of the incoming gradient, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        result: Tensor = torch.ops.hybridengine.dropout(x, p, seed, "cpu")
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return operators.apply(_Dropout, gradient, ctx.p, ctx.seed), None, None


def run(x: Tensor, p: float, seed: int) -> Tensor:
    """Return `x` with dropout."""
    result: Tensor = operators.apply(_Dropout, x, p, seed)
    return result


def _operator(x: Tensor, p: float, seed: int) -> Tensor:
    """The operator's kernel: a checked tensor in, addresses to the library."""
    record("dropout", "cpu")
    source = x.contiguous()
    out = native.empty(tuple(x.shape), x.dtype)
    element = native.ELEMENT_TYPES[x.dtype]
    native.module().dropout(element, source.data_ptr(), out.data_ptr(), source.numel(), seed, threshold(p), scale(p))
    return out


operators.define(
    "dropout(Tensor x, float p, int seed, str impl) -> Tensor",
    lambda x, p, seed: torch.empty_like(x, memory_format=torch.contiguous_format),
)
operators.implement("dropout", "cpu", _operator)
