"""The leaf loss of tasks that predict something at every token: cross-entropy, summed; its unit is the token."""

from __future__ import annotations

from torch import Tensor

from hybridengine import kernels
from hybridengine.seams.types import Batch, Prediction, Term

__all__ = ["IGNORED", "token_prediction", "token_terms"]

IGNORED = -100
"""The target of a token that is not scored."""


def token_terms(
    logits: Tensor, batch: Batch, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> dict[str, Term]:
    """The loss from logits `[B, L, C]` and targets `[B, L]`; `weight` `[C]` is a factor for each class."""
    flat, target = logits.flatten(0, 1), batch.targets.flatten()
    loss = kernels.cross_entropy(
        flat, target, weight=weight, label_smoothing=label_smoothing, ignore_index=IGNORED, reduction="sum"
    )
    return {"loss": (loss, "tokens")}


def token_prediction(logits: Tensor, batch: Batch) -> Prediction:
    """The loss, and of each row the summed loss and the number of scored tokens; neither scores nor texts."""
    flat, target = logits.flatten(0, 1), batch.targets.flatten()
    each = kernels.cross_entropy(flat, target, reduction="none", ignore_index=IGNORED)
    rows = each.view(batch.targets.shape).sum(1)
    tokens = (batch.targets != IGNORED).sum(1)
    return Prediction(terms={"loss": (rows.sum(), "tokens")}, per_row={"loss": rows, "tokens": tokens})
