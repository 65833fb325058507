"""How far the layers of one model are from those of a deeper or shallower one, as sums over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridengine.seams.precision import wide

__all__ = ["attention_distance", "hidden_distance", "paired_layers"]


def paired_layers(mine: int, theirs: int) -> list[int]:
    """For each of `mine` layers the one of `theirs` at that share of the depth, counted from 1: ceil(i theirs / mine).

    Twelve layers teach four of them as 3, 6, 9, 12.
    """
    return [-(-i * theirs // mine) for i in range(1, mine + 1)]


def hidden_distance(
    mine: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor, project: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Sum over rows of the mean squared distance of hidden states, over a row's tokens, coordinates and layers.

    Args:
        mine: states `[B, L, D]` before the first layer and after each.
        theirs: those of the other model, `[B, L, E]`.
        mask: `[B, L]`, 0 at padding.
        project: states of width D to width E; none where the widths are equal.

    Raises:
        ValueError: a model gave no states, or states of other positions.
    """
    _check(mine[1:], theirs[1:], "hidden states")
    pairs = [0, *paired_layers(len(mine) - 1, len(theirs) - 1)]
    projected = [wide(x) if project is None else project(wide(x)) for x in mine]
    _check_shapes(projected[-1], theirs[-1], "hidden states")
    apart = [(x - wide(theirs[j])).square().mean(-1) for x, j in zip(projected, pairs, strict=True)]
    return _over_tokens(torch.stack(apart).mean(0), mask)


def attention_distance(mine: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Sum over rows of the squared distance of attention maps, the mean over a row's tokens, heads and layers.

    Where the numbers of heads differ, the means over heads are compared.

    Args:
        mine: maps `[B, H, L, L]` of each layer.
        theirs: those of the other model.
        mask: `[B, L]`, 0 at padding.

    Raises:
        ValueError: a model gave no maps, or maps of other positions.
    """
    _check(mine, theirs, "attention maps")
    _check_shapes(mine[-1][:, 0], theirs[-1][:, 0], "attention maps")
    apart = []
    for x, j in zip(mine, paired_layers(len(mine), len(theirs)), strict=True):
        p, q = wide(x), wide(theirs[j - 1])
        if p.shape[1] != q.shape[1]:
            p, q = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
        apart.append((p - q).square().sum(-1).mean(1))
    return _over_tokens(torch.stack(apart).mean(0), mask)


def _check(mine: Sequence[Tensor], theirs: Sequence[Tensor], what: str) -> None:
    for whose, layers in (("this model", mine), ("the other model", theirs)):
        if not layers or any(layer is None for layer in layers):
            raise ValueError(f"{whose} gave no {what} of its layers, though asked for them")


def _check_shapes(mine: Tensor, theirs: Tensor, what: str) -> None:
    if mine.shape != theirs.shape:
        raise ValueError(f"{what} of shapes {tuple(mine.shape)} and {tuple(theirs.shape)} cannot be compared")


def _over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    real = mask.to(values.dtype)
    return ((values * real).sum(1) / real.sum(1).clamp_min(1)).sum()
