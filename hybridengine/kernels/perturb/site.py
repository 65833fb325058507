"""One embedding site of a batch, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Site"]


class Site(NamedTuple):
    """`delta` and `gradient` [B, L, D] and the boolean `mask` [B, L] of one site."""

    delta: Tensor
    gradient: Tensor
    mask: Tensor

    @classmethod
    def of(cls, delta: Tensor, gradient: Tensor, mask: Tensor) -> Site:
        """Check shapes; detach; make the mask boolean.

        Raises:
            ValueError: if the shapes do not match.
        """
        if delta.dim() != 3 or gradient.shape != delta.shape or mask.shape != delta.shape[:2]:
            raise ValueError(
                "expected delta and gradient [B, L, D] and mask [B, L], got "
                f"{tuple(delta.shape)}, {tuple(gradient.shape)} and {tuple(mask.shape)}"
            )
        return cls(delta.detach(), gradient.detach(), mask if mask.dtype == torch.bool else mask != 0)
