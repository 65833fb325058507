"""Kullback-Leibler divergence between two evaluations of a batch, as a sum over rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.seams.types import Batch

__all__ = ["kl_rows", "sequence_norms"]


def kl_rows(p: Tensor, q: Tensor, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """Sum over rows of KL(softmax(p/T) || softmax(q/T)), a scalar with the unit `rows`.

    For `[B, C]` logits each row counts once; for `[B, L, C]` a row's value is the mean over its scored tokens
    (`masks["scored"]`, else `attention`), so that long rows do not outweigh short ones and padding never counts.
    """
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    log_p = functional.log_softmax(p.to(wide) / temperature, dim=-1)
    log_q = functional.log_softmax(q.to(wide) / temperature, dim=-1)
    values = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if values.dim() == 1:
        return values.sum()
    mask = _token_mask(batch, values).to(values.dtype)
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).sum()


def _token_mask(batch: Batch, values: Tensor) -> Tensor:
    for kind in ("scored", "attention"):
        for mask in batch.masks.get(kind, {}).values():
            if mask.shape == values.shape:
                return mask
    raise ValueError(f"no mask of shape {tuple(values.shape)} in the batch; token logits need a `scored` mask")


def sequence_norms(delta: dict[str, Tensor]) -> Tensor:
    """L2 norm per sequence `[B]`, joint over all sites, in at least fp32."""
    squares = [(d if d.dtype == torch.float64 else d.float()).flatten(1).square().sum(1) for d in delta.values()]
    return torch.stack(squares).sum(0).sqrt()
