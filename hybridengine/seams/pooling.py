"""One vector for a text."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hybridengine.seams.precision import wide

__all__ = ["pooled"]


def pooled(states: Tensor, mask: Tensor, how: Literal["mean", "first"]) -> Tensor:
    """Hidden states `[B, L, D]` to `[B, D]`, in at least fp32: the mean of a row's tokens, or its first one.

    Args:
        mask: `[B, L]`, 0 at padding, which may stand on either side.
    """
    states = wide(states)
    if how == "mean":
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)
    first = mask.to(torch.int).argmax(1)
    return states[torch.arange(len(states), device=states.device), first]
