"""The log-probability that a prediction gives to the truth, unit by unit."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.seams.precision import wide
from hybridengine.seams.types import Batch

__all__ = ["log_likelihoods"]


def log_likelihoods(logits: Tensor, batch: Batch, task: object = None) -> tuple[Tensor, Literal["rows", "tokens"]]:
    """Log-probabilities of the targets, and the unit that their sum counts in.

    Args:
        logits: `[B, C]` for rows, `[B, L, C]` for tokens.
        batch: targets `[B]` or `[B, L]` (ignored tokens, at -100, get 0: the truth for certain); zeros and ones
            `[B, C]` where `task.distribution` is `bernoulli`.

    Returns:
        `[B]`, `[B·L]`, or `[B, C]` with one entry per label.
    """
    assert batch.targets is not None
    if getattr(task, "distribution", "softmax") == "bernoulli":
        return functional.logsigmoid((2 * batch.targets - 1) * wide(logits)), "rows"
    flat, targets = logits.flatten(0, -2), batch.targets.flatten()
    return -kernels.cross_entropy(flat, targets, reduction="none"), "rows" if logits.dim() == 2 else "tokens"
