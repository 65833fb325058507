"""The draws for one embedding site, checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Draws"]


class Draws(NamedTuple):
    """`uniform` [B, L, D] and the boolean `mask` [B, L] of one site."""

    uniform: Tensor
    mask: Tensor

    @classmethod
    def of(cls, uniform: Tensor, mask: Tensor) -> Draws:
        """Check shapes; detach; make the mask boolean.

        Raises:
            ValueError: if the shapes do not match.
        """
        if uniform.dim() != 3 or mask.shape != uniform.shape[:2]:
            raise ValueError(
                f"expected uniform [B, L, D] and mask [B, L], got {tuple(uniform.shape)} and {tuple(mask.shape)}"
            )
        return cls(uniform.detach(), mask if mask.dtype == torch.bool else mask != 0)

    def by_token(self) -> Draws:
        """Every token as a sequence of its own: [B L, 1, D]."""
        return Draws(self.uniform.flatten(0, 1).unsqueeze(1), self.mask.flatten().unsqueeze(1))
