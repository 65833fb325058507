"""The embedding's gradient on the CPU by the native library: `csrc/embedding/`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.modes import differentiated_again, why_not_transformed

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(weight: Tensor, ids: Tensor, padding: int) -> str | None:
    """Say why these arguments cannot run here."""
    if weight.device.type != "cpu" or ids.device.type != "cpu":
        return "a tensor is not on the CPU"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, got {weight.dtype}"
    if ids.dtype != torch.int64:
        return f"ids are int64, got {ids.dtype}"
    return why_not_transformed(weight, ids)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = weight.shape[0], padding
        result: Tensor = torch.embedding(weight, ids, padding)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        if differentiated_again(gradient):
            return torch.ops.aten.embedding_dense_backward(gradient, ids, ctx.rows, ctx.padding, False), None, None
        return _gradient(gradient, ids, ctx.rows, ctx.padding), None, None


def _gradient(gradient: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    record("embedding", "cpu")
    source, places = gradient.contiguous(), ids.contiguous()
    width = source.shape[-1]
    out = native.empty((rows, width), source.dtype)
    native.module().embedding_gradient(
        native.ELEMENT_TYPES[source.dtype],
        source.data_ptr(),
        places.data_ptr(),
        out.data_ptr(),
        places.numel(),
        rows,
        width,
        padding,
    )
    return out


def run(weight: Tensor, ids: Tensor, padding: int) -> Tensor:
    """Return the rows of `weight` that `ids` name."""
    result: Tensor = operators.apply(_Embedding, weight, ids, padding)
    return result
