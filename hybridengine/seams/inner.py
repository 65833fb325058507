"""The inner loop of meta-learning: a few gradient steps on an episode's support rows, differentiable if asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hybridengine.errors import ConfigError
from hybridengine.seams.context import Context
from hybridengine.seams.types import Batch, Out, View, weighted_sum

__all__ = ["InnerUpdate", "distance", "inner_loop", "leaves_at", "queries_of", "support_of"]

InnerUpdate = Callable[[int, str, Tensor, Tensor], Tensor]
"""(step, name of the parameter, its value, its gradient) to the value after the step."""


def support_of(batch: Batch, method: str) -> Batch:
    """The support rows of an episode.

    Raises:
        ConfigError: the batch is no episode; `method` is named.
    """
    support = batch.parts.get("support")
    if support is None:
        raise ConfigError(f"{method}: this batch has no support rows; add `episodes: {{ways: N, shots: K}}`")
    return support


def queries_of(batch: Batch) -> Batch:
    """An episode's query rows alone, as an ordinary batch with whatever other parts it has."""
    return replace(batch, parts={name: part for name, part in batch.parts.items() if name not in ("support", "query")})


def inner_loop(
    ctx: Context,
    support: Batch,
    view: View,
    start: Mapping[str, Tensor],
    update: InnerUpdate,
    *,
    steps: int,
    first_order: bool,
    loss: Callable[[Batch, View], Out] | None = None,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The parameters after each step, and the mean support loss before the first.

    Args:
        start: the parameters to adapt, by name.
        update: what a step does to one of them.
        first_order: gradients of the inner loop are constants; else they can be differentiated.
        loss: what the inner loop descends; the task's own by default.
    """
    evaluate = loss or ctx.task_loss
    own = {unit: 1 / max(count, 1) for unit, count in support.counts.items()}
    fast, path, first = dict(start), [], None
    for step in range(steps):
        with contextlib.nullcontext() if first_order else ctx.second_order():
            out = evaluate(support, view.clean().with_params(fast).fork("inner", step))
            value = weighted_sum(out.terms, own)
            grads = ctx.grad(value, list(fast.values()), create_graph=not first_order)
        pairs = zip(fast.items(), grads, strict=True)
        fast = {k: x if g is None else update(step, k, x, g) for (k, x), g in pairs}
        path.append(fast)
        first = value if first is None else first
    assert first is not None, "an inner loop takes a step"
    return path, first


def leaves_at(point: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached leaves at a point of the path: query passes may run backward on them as often as they like."""
    return {name: value.detach().requires_grad_() for name, value in point.items()}


def distance(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> Tensor:
    """How far an inner loop travelled, as a norm over all tensors."""
    moved = [(end[k].detach() - x.detach()).flatten() for k, x in start.items()]
    return torch.nn.utils.get_total_norm(moved)
