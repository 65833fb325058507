"""Divergences between evaluations of a batch, as sums over rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.seams.precision import wide
from hybridengine.seams.types import Batch

__all__ = ["js_rows", "kl_rows", "sequence_norms"]


def kl_rows(
    p: Tensor,
    q: Tensor,
    batch: Batch,
    task: object = None,
    *,
    temperature: float = 1.0,
    direction: Literal["forward", "symmetric"] = "forward",
    counted: Tensor | None = None,
) -> Tensor:
    """Sum over rows of KL(P || Q), P and Q the distributions of logits p/T and q/T; a scalar with the unit `rows`.

    They are softmaxes over the last axis, KL = sum_c P_c log(P_c / Q_c), unless `task.distribution` is `bernoulli`:
    then each entry is a label of its own, that applies with probability sigmoid, and KL is the sum over the labels

        sum_c sigmoid(p_c) log(sigmoid(p_c) / sigmoid(q_c)) + sigmoid(-p_c) log(sigmoid(-p_c) / sigmoid(-q_c))

    For `[B, C]` logits each row counts once; for `[B, L, C]` a row's value is the mean over its scored tokens
    (`masks["scored"]`, else `attention`), so that long rows do not outweigh short ones and padding never counts.

    Args:
        task: `ctx.run.task`, which tells what the logits mean; softmax where it tells nothing.
        direction: "symmetric" for (KL(P || Q) + KL(Q || P)) / 2.
        counted: `[B]`, which rows count; all without it.

    Raises:
        ValueError: for another distribution than `softmax` and `bernoulli`, or token logits without a mask.
    """
    distribution = getattr(task, "distribution", "softmax")
    if distribution == "softmax":
        values_of = partial(_of_choices, temperature=temperature, direction=direction)
    elif distribution == "bernoulli":
        values_of = partial(_of_labels, temperature=temperature, direction=direction)
    else:
        raise ValueError(f"a task's distribution is 'softmax' or 'bernoulli', not {distribution!r}")
    if p.dim() == 2:
        values = values_of(p, q, None if counted is None else counted != 0)
        return (values if counted is None else values * counted).sum()
    mask = _token_mask(batch, p)
    if counted is not None:
        mask = mask * counted[:, None]
    values = values_of(p, q, mask != 0)
    return ((values * mask).sum(1) / mask.sum(1).clamp_min(1)).sum()


def js_rows(logits: Sequence[Tensor], batch: Batch, task: object = None) -> Tensor:
    """Sum over rows of the Jensen-Shannon divergence of N predictions: sum_n KL(P_n || M) / N, M their mean.

    Rows, tokens and labels count as in `kl_rows`. It lies between 0, for equal predictions, and log N (for each label
    where those are decided one by one).
    """
    if getattr(task, "distribution", "softmax") == "bernoulli":
        halves = torch.stack([_log_yes_and_no(wide(x)) for x in logits]).logsumexp(0).chunk(2, -1)
        mean = halves[0] - halves[1]
    else:
        mean = torch.stack([wide(x).log_softmax(-1) for x in logits]).logsumexp(0)
    return torch.stack([kl_rows(x, mean, batch, task) for x in logits]).sum() / len(logits)


def _of_choices(p: Tensor, q: Tensor, counted: Tensor | None, temperature: float, direction: Any) -> Tensor:
    """Return the divergence of the softmaxes over the last axis; 0 where not `counted`, which costs no time."""
    rows = None if counted is None else counted.flatten()
    flat = (x.flatten(0, -2) for x in (p, q))
    values = kernels.kl_pair(*flat, temperature=temperature, mask=rows, reduction="none", direction=direction)
    return values.view(p.shape[:-1])


def _of_labels(p: Tensor, q: Tensor, counted: Tensor | None, temperature: float, direction: str) -> Tensor:
    """Return the divergence of the yes and no of each label, summed over the last axis."""
    log_p, log_q = (_log_yes_and_no(wide(x) / temperature) for x in (p, q))
    values = functional.kl_div(log_q, log_p, log_target=True, reduction="none")
    if direction == "symmetric":
        values = (values + functional.kl_div(log_p, log_q, log_target=True, reduction="none")) / 2
    return values.sum(-1)


def _log_yes_and_no(logits: Tensor) -> Tensor:
    # finite and smooth for logits of any size
    return torch.cat([functional.logsigmoid(logits), functional.logsigmoid(-logits)], dim=-1)


def _token_mask(batch: Batch, logits: Tensor) -> Tensor:
    wanted = logits.shape[:-1]
    for kind in ("scored", "attention"):
        for mask in batch.masks.get(kind, {}).values():
            if mask.shape == wanted:
                return mask
    raise ValueError(f"no mask of shape {tuple(wanted)} in the batch; token logits need a `scored` mask")


def sequence_norms(delta: dict[str, Tensor]) -> Tensor:
    """L2 norm per sequence `[B]`, joint over all sites, in at least fp32."""
    squares = [wide(d).flatten(1).square().sum(1) for d in delta.values()]
    return torch.stack(squares).sum(0).sqrt()
