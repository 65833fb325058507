"""Small losses on a CPU: where plain torch is faster, and the short way to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy.options import REDUCTIONS
from hybridengine.kernels.cross_entropy.reference import may_ignore
from hybridengine.kernels.dispatch import is_overridden, record

__all__ = ["quick", "why_slower_for"]

_torch_cross_entropy: Callable[..., Tensor] = torch._C._nn.cross_entropy_loss

# What a call costs more than torch's, 60 microseconds of an autograd function written in Python, must be saved by its
# rows (`hybridengine bench`). From 100 classes on a row saves at least 60 ns. Below the width of a vector, where torch
# takes 25 ns a class and this 90 a row, it saves 25 V - 90; in between neither is much faster than the other.
_FEWEST_CLASSES = 96
_FEWEST_ELEMENTS = 200_000
_SCALAR_BELOW = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 0)


def why_slower_for(rows: int, classes: int) -> str | None:
    """Say why plain torch is faster for [rows, classes]."""
    if classes >= _FEWEST_CLASSES:
        return None if rows * classes >= _FEWEST_ELEMENTS else f"fewer than {_FEWEST_ELEMENTS} logits"
    if classes < _SCALAR_BELOW and rows * (25 * classes - 90) >= 80_000:
        return None
    return f"fewer than {_FEWEST_CLASSES} classes: plain torch is faster"


def quick(logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, reduction: str) -> Tensor | None:
    """Return torch's own loss where nothing needs to be asked but that it is the faster one; None elsewhere.

    A small loss takes torch 30 microseconds: the questions of the ordinary way would be a third of that.
    """
    if logits.dtype != torch.float32 or target.dtype != torch.int64 or logits.dim() != 2 or target.dim() != 1:
        return None
    rows, classes = logits.shape
    kind = REDUCTIONS.get(reduction)
    if (
        kind is None
        or rows != target.shape[0]
        or rows == 0
        or not 0.0 <= label_smoothing <= 1.0
        or why_slower_for(rows, classes) is None
    ):
        return None
    if may_ignore(target, classes, ignore_index) or not logits.is_cpu or is_overridden("cross_entropy"):
        return None
    record("cross_entropy", "reference")
    return _torch_cross_entropy(logits, target, None, kind, ignore_index, label_smoothing)
