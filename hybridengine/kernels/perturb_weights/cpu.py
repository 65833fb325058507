"""The move of many weights on the CPU by the native library: `csrc/perturb_weights/`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.keep import cpu as keep
from hybridengine.kernels.keep.kept import mark_changed
from hybridengine.kernels.perturb_weights.moved import MovedWeights

__all__ = ["run", "why_missing", "why_not"]

# The numbers of `WeightRule` in csrc/perturb_weights/perturb_weights.h.
_RULES = {"sam": 0, "asam": 1, "awp": 2}

why_missing = native.why_missing


def why_not(weights: list[Tensor], gradients: list[Tensor]) -> str | None:
    """Say why these tensors cannot be moved here."""
    for w, g in zip(weights, gradients, strict=True):
        if w.dtype not in native.ELEMENT_TYPES:
            return f"it takes float32, bfloat16 and float64, got {w.dtype}"
        if g.dtype != w.dtype and (w.dtype, g.dtype) != (torch.bfloat16, torch.float32):
            return f"a gradient is of the weight's dtype, or float32 beside bfloat16; got {g.dtype} beside {w.dtype}"
        if g.device.type != "cpu" or g.layout != torch.strided:
            return "a gradient is not a dense one on the CPU"
        if torch._C._functorch.is_functorch_wrapped_tensor(g):
            return "it has no rule for torch.func transforms"
    if (reason := keep.why_not(weights)) is not None:
        return reason
    # Saved and moved in one pass: of two that overlap, the second would save what the first has moved.
    spans = sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in weights if w.numel())
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        return "two weights share memory"
    return None


def run(weights: list[Tensor], gradients: list[Tensor], rule: str, rho: float, eta: float) -> MovedWeights:
    """Move the weights; return what restores them."""
    record("perturb_weights", "cpu")
    copy = keep.Copy.of(weights)
    sources = [g.contiguous() for g in gradients]
    tensors = [
        (native.ELEMENT_TYPES[w.dtype], native.ELEMENT_TYPES[g.dtype], w.data_ptr(), g.data_ptr(), saved, w.numel())
        for w, g, saved in zip(weights, sources, copy.addresses, strict=True)
    ]
    move = native.module().perturb_weights(tensors, _RULES[rule], rho, eta)
    norm, distance, usable, moved = move
    if not moved:
        return MovedWeights(norm, usable, lambda: 0.0, lambda: None)
    mark_changed(weights)
    return MovedWeights(norm, usable, lambda: distance, copy.restore)
