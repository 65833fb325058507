"""What a chunked run asks of a row kernel, and the types that its parts hand each other."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy.options import is_soft

__all__ = ["Gradients", "Head", "RowKernel", "Split", "Wanted", "counted_rows"]


class Head(NamedTuple):
    """The tensors of a problem: x [N, H], weight [V, H], bias [V] or None, target [N] or [N, V], class_weight [V]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None


class Split(NamedTuple):
    """How it is computed: `chunk_rows` rows of all logits at a time, or all rows of `block_classes` classes if not 0.

    `dtype` is what is multiplied. It is settled before the operators, which see no autocast.
    """

    chunk_rows: int
    block_classes: int
    dtype: torch.dtype


class Wanted(NamedTuple):
    """Whose gradients are wanted."""

    x: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of x, weight and bias, each in its tensor's dtype, or None."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def counted_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """Return the indices of the rows that count, or None if all do."""
    if is_soft(target):
        return None
    counted = (target != ignore_index).nonzero().squeeze(-1)
    return None if len(counted) == len(target) else counted


class RowKernel(Protocol):
    """Cross-entropy of some rows of logits."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        loss: Tensor,
        lse: Tensor,
        gradient: Tensor | None,
        by_loss: Tensor | None,
        by_lse: Tensor | None,
    ) -> None:
        """Fill `loss` and `lse` [B], and `gradient` for what comes in; it may be the logits themselves.

        With `by_loss` the loss may be any number: who says what comes in has the loss already.
        """
