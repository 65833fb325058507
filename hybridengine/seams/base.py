"""The base case of each seam: what runs when no method wraps it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridengine.seams.context import Context
from hybridengine.seams.randomness import mix
from hybridengine.seams.types import Batch, View, Work, add_terms, weight_of, weighted, weighted_sum

__all__ = ["base_backward", "base_gradient", "base_step", "make_works"]


def make_works(seed: int, step: int, batches: Sequence[Batch]) -> list[Work]:
    """Weight each micro-batch of a step: per task and unit, one over the total of the whole step.

    Hence any split of a step into micro-batches gives the same gradient, for token, sequence and unlabelled terms
    alike. The dropout key follows (seed, step, position).
    """
    totals: Counter[tuple[str, str]] = Counter()
    for batch in batches:
        for unit, n in batch.counts.items():
            totals[batch.task, unit] += n
    first_key = mix(seed, step, 0)
    works = []
    for index, batch in enumerate(batches):
        weights = {unit: 1 / max(totals[batch.task, unit], 1) for unit in batch.counts}
        works.append(Work(batch, weights, View(key=first_key + index), index))
    return works


def base_backward(ctx: Context, work: Work) -> dict[str, Tensor]:
    """Evaluate the loss and add its weighted gradient to `.grad`; returns the weighted terms."""
    out = ctx.loss(ctx, work.batch, work.view)
    if len(out.terms) == 1:  # its weight is the gradient that backward starts from: no node of the graph
        ((name, (loss, unit)),) = out.terms.items()
        weight, value = torch.full_like(loss, weight_of(unit, work.weights, name)), loss.detach()
        terms = {name: value * weight}
    else:
        loss, weight = weighted_sum(out.terms, work.weights), None
        terms = {name: weighted(value.detach(), work.weights[unit]) for name, (value, unit) in out.terms.items()}
        value = loss.detach()
    ctx.witness.append((work.batch.rows, value))
    ctx.accumulate(loss, weight)
    return terms


def base_gradient(ctx: Context, works: Sequence[Work]) -> dict[str, Tensor]:
    """Accumulate over the step's micro-batches; only the last backward synchronises."""
    with ctx.no_sync():
        parts = [ctx.backward(ctx, work) for work in works[:-1]]
    parts += [ctx.backward(ctx, work) for work in works[-1:]]
    return add_terms(*parts)


def base_step(ctx: Context, works: Sequence[Work]) -> dict[str, Tensor]:
    """Zero, collect the gradient, update."""
    ctx.zero()
    terms = dict(ctx.gradient(ctx, works))
    terms["gradient_norm"] = torch.full((), ctx.apply())
    return terms
