"""GELU on the CPU by the native library: `csrc/gelu/`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.modes import differentiated_again, why_not_transformed

__all__ = ["run", "why_missing", "why_not", "why_slower"]

# Below, what an autograd function written in Python costs is more than the kernel saves.
_SMALLEST = 1 << 16

why_missing = native.why_missing


def why_not(x: Tensor) -> str | None:
    """Say why this tensor cannot run here."""
    if x.device.type != "cpu" or x.layout != torch.strided:
        return "the tensor is not a dense one on the CPU"
    if x.dtype != torch.float32:
        return f"it takes float32, got {x.dtype}"
    if (reason := why_not_transformed(x)) is not None:
        return reason
    return None if x.is_contiguous() else "the tensor is not contiguous"


def why_slower(x: Tensor) -> str | None:
    """Say why torch would be faster for this tensor."""
    return f"below {_SMALLEST} elements torch is faster" if x.numel() < _SMALLEST else None


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        result: Tensor = torch.ops.hybridengine.gelu(x, "cpu")
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor
        if differentiated_again(gradient):
            result = torch.ops.aten.gelu_backward(gradient, x)
        else:
            result = torch.ops.hybridengine.gelu_backward(gradient, x, "cpu")
        return result


def run(x: Tensor) -> Tensor:
    """Return x Phi(x)."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    result: Tensor = operators.apply(_Gelu, x) if wanted else torch.ops.hybridengine.gelu(x, "cpu")
    return result


def _launch(x: Tensor, gradient: Tensor | None) -> Tensor:
    """Checked tensors in, addresses to the library."""
    record("gelu", "cpu")
    source = x.contiguous()
    incoming = None if gradient is None else gradient.contiguous()
    out = native.empty(tuple(x.shape), x.dtype)
    address = 0 if incoming is None else incoming.data_ptr()
    native.module().gelu(source.data_ptr(), address, out.data_ptr(), source.numel())
    return out


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


operators.define("gelu(Tensor x, str impl) -> Tensor", _fake)
operators.define("gelu_backward(Tensor gradient, Tensor x, str impl) -> Tensor", lambda gradient, x: _fake(x))
operators.implement("gelu", "cpu", lambda x: _launch(x, None))
operators.implement("gelu_backward", "cpu", lambda gradient, x: _launch(x, gradient))
