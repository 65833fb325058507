"""A context in which a model's own dropout, attention, embeddings and GELU use the kernels, the model unchanged."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hybridengine.kernels import native
from hybridengine.kernels.dropout import OPERATION as DROPOUT
from hybridengine.kernels.dropout import dropout
from hybridengine.kernels.embedding import OPERATION as EMBEDDING
from hybridengine.kernels.embedding import embedding
from hybridengine.kernels.gelu import OPERATION as GELU
from hybridengine.kernels.gelu import gelu

__all__ = ["fast_forward"]

# Below these an autograd function written in Python costs more than it saves.
_SMALLEST_MASK = 16384
_SMALLEST_TABLE = 1 << 20


@contextlib.contextmanager
def fast_forward() -> Iterator[None]:
    """Inside, large CPU tensors in `dropout`, attention, `embedding` and `gelu` use the native kernels.

    Torch draws CPU masks serially (7 ns an element on CPUs without MKL's generator) and zeroes a whole table for the
    gradient of a few rows; the kernels do both in parallel. GELU's gradient takes them half of torch's arithmetic. The
    seed of each mask comes from torch's global generator, so `torch.manual_seed` still decides every mask. Only for
    code that runs inside to its end: gradient checkpointing, which runs a forward again during backward, must be
    outside. `HYBRIDENGINE_IMPL` may switch each kernel off.
    """
    if native.why_missing() is not None:
        yield
        return
    with _FastForward():
        yield


class _FastForward(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        result = None if replacement is None else replacement(*args, **options)
        return func(*args, **options) if result is None else result


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    if not training or inplace or not 0 < p < 1 or x.numel() < _SMALLEST_MASK or not DROPOUT.is_native(x, p, None):
        return None
    return dropout(x, p)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """What torch does on a CPU when attention has dropout, step by step; the rest is left to torch."""
    if not 0 < dropout_p < 1 or is_causal or enable_gqa or query.dtype not in (torch.float32, torch.float64):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    if query.shape[:-1].numel() * key.shape[-2] < _SMALLEST_MASK or not DROPOUT.is_native(query, dropout_p, None):
        return None
    scores = query @ key.transpose(-2, -1)  # scaled afterwards: for short texts the smaller tensor by far
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    everywhere = True
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf
        everywhere = bool(allowed.any(-1).all())
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask
    # A row that may attend to nothing gets zeros, as torch's own gives, not NaN.
    weights = scores.softmax(-1) if everywhere else _safe_softmax(scores)
    return dropout(weights, dropout_p) @ value


def _safe_softmax(scores: Tensor) -> Tensor:
    softmax: Any = torch.ops.aten._safe_softmax
    result: Tensor = softmax(scores, -1)
    return result


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if max_norm is not None or scale_grad_by_freq or sparse or not weight.requires_grad:
        return None
    if weight.numel() < _SMALLEST_TABLE or not EMBEDDING.is_native(weight, input, -1):
        return None
    return embedding(weight, input, padding_idx=padding_idx)


def _gelu(input: Tensor, *, approximate: str = "none", out: Tensor | None = None) -> Tensor | None:
    if approximate != "none" or out is not None or not GELU.is_native(input):
        return None
    return gelu(input)


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.dropout: _dropout,
    functional.embedding: _embedding,
    functional.gelu: _gelu,
    functional.scaled_dot_product_attention: _attention,
}
