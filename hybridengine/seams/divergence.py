"""Kullback-Leibler divergence between two evaluations of a batch, as a sum over rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.seams.types import Batch

__all__ = ["kl_rows", "sequence_norms"]


def kl_rows(p: Tensor, q: Tensor, batch: Batch, task: object = None, *, temperature: float = 1.0) -> Tensor:
    """Sum over rows of KL(P || Q), P and Q the distributions of logits p/T and q/T; a scalar with the unit `rows`.

    They are softmaxes over the last axis, KL = sum_c P_c log(P_c / Q_c), unless `task.distribution` is `bernoulli`:
    then each entry is a label of its own, that applies with probability sigmoid, and KL is the sum over the labels

        sum_c sigmoid(p_c) log(sigmoid(p_c) / sigmoid(q_c)) + sigmoid(-p_c) log(sigmoid(-p_c) / sigmoid(-q_c))

    For `[B, C]` logits each row counts once; for `[B, L, C]` a row's value is the mean over its scored tokens
    (`masks["scored"]`, else `attention`), so that long rows do not outweigh short ones and padding never counts.

    Args:
        task: `ctx.run.task`, which tells what the logits mean; softmax where it tells nothing.

    Raises:
        ValueError: for another distribution than `softmax` and `bernoulli`, or token logits without a mask.
    """
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    distribution = getattr(task, "distribution", "softmax")
    log_p, log_q = (_log_probabilities(x.to(wide) / temperature, distribution) for x in (p, q))
    values = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if values.dim() == 1:
        return values.sum()
    mask = _token_mask(batch, values).to(values.dtype)
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).sum()


def _log_probabilities(logits: Tensor, distribution: str) -> Tensor:
    if distribution == "softmax":
        return functional.log_softmax(logits, dim=-1)
    if distribution == "bernoulli":  # yes and no of each label; finite and smooth for logits of any size
        return torch.cat([functional.logsigmoid(logits), functional.logsigmoid(-logits)], dim=-1)
    raise ValueError(f"a task's distribution is 'softmax' or 'bernoulli', not {distribution!r}")


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
