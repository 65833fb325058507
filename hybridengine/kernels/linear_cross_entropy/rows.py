"""What a chunked run asks of a row kernel, and the types that its parts hand each other."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["Gradients", "Head", "RowKernel", "Wanted"]


class Head(NamedTuple):
    """The tensors of a problem: x [N, H], weight [V, H], bias [V] or None, target [N] or [N, V], class_weight [V]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None


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


class RowKernel(Protocol):
    """Cross-entropy of a chunk of logits, its gradient written over them."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        loss: Tensor,
        lse: Tensor,
        want_gradient: bool,
        by_loss: Tensor | None,
        by_lse: Tensor | None,
    ) -> None:
        """Fill `loss` and `lse` [B]; if wanted, put the gradient for what comes in in the place of `logits`."""
