"""First and second derivative of cross-entropy in plain torch, differentiable by autograd to any order.

Notation and formula of the loss: `reference.py`. With the factors s of the loss and r of the z term, and incoming
gradients g of a row's loss and u of its log-sum-exp, the gradient of a row is

    G_j = y'_j (a p_j - g s q_j),        a = g (s h + 2 r z lse) + u

and, for a direction v, with m = y' v (elementwise) and <p, m> = sum_j p_j m_j,

    d <v, G> / dx = y'' v (a p - g s q) + y' p (a (m - <p, m>) + 2 g r z <p, m>)
    d <v, G> / dg = (s h + 2 r z lse) <p, m> - s <q, m>,        d <v, G> / du = <p, m>
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy.options import Options, factors, is_soft
from hybridengine.kernels.cross_entropy.reference import capped
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["Problem", "gradient", "second_derivative", "slope_of"]


class _Row(NamedTuple):
    """Of each row; [N, V] or [N, 1]."""

    p: Tensor
    q: Tensor
    h: Tensor
    lse: Tensor
    slope: Tensor | float  # y'
    bend: Tensor | float  # y''
    counts: Tensor  # 1, or 0 where ignored
    loss_factor: Tensor  # s; 0 where ignored
    z_factor: Tensor  # r; 0 where ignored


class Problem(NamedTuple):
    """Rows of logits [N, V], their targets, and the factors of their losses and z terms (`options.factors`)."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    options: Options
    by_loss: Tensor
    by_z: Tensor

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Problem:
        """All rows of a loss."""
        by_loss, by_z, _ = factors(logits, target, weight, options)
        return cls(logits, target, weight, options, by_loss, by_z)


def _rows(problem: Problem) -> _Row:
    logits, target, weight, options = problem[:4]
    dtype, classes = accumulator_dtype(logits.dtype), logits.shape[-1]
    x, uniform = logits.to(dtype), options.label_smoothing / classes
    w = x.new_ones(classes) if weight is None else weight.to(dtype)
    if is_soft(target):
        counts = x.new_ones(*target.shape[:-1], 1)
        q = ((1.0 - options.label_smoothing) * target.to(dtype) + uniform) * w
    else:
        ignored = (target == options.ignore_index).unsqueeze(-1)
        # Ignored rows are emptied before anything is computed: 0 * NaN would be NaN in every later derivative.
        x = x.masked_fill(ignored, 0.0)
        label = target.unsqueeze(-1).masked_fill(ignored, 0)
        onehot = torch.zeros_like(x).scatter(-1, label, 1.0)
        q = ((1.0 - options.label_smoothing) * onehot + uniform) * w
        counts = (~ignored).to(dtype)
    y = capped(x, options)
    slope = slope_of(y, options)
    bend = _bend_of(y, slope, options)
    p, lse = torch.softmax(y, -1), torch.logsumexp(y, -1, keepdim=True)
    return _Row(
        p, q, q.sum(-1, keepdim=True), lse, slope, bend, counts, problem.by_loss * counts, problem.by_z * counts
    )


def slope_of(y: Tensor, options: Options) -> Tensor | float:
    """Return dy/dx where scale and softcap gave the logits `y`."""
    return options.scale * (1.0 - (y / options.softcap).square()) if options.softcap else options.scale


def _bend_of(y: Tensor, slope: Tensor | float, options: Options) -> Tensor | float:
    """Return the second derivative."""
    return (-2.0 * options.scale / options.softcap**2) * y * slope if options.softcap else 0.0


def _incoming(by_loss: Tensor | None, by_lse: Tensor | None, row: _Row) -> tuple[Tensor, Tensor]:
    """Return g and u, [N, 1] or [1, 1]."""
    g = row.lse.new_zeros(1, 1) if by_loss is None else by_loss.reshape(-1, 1).to(row.lse.dtype)
    u = row.lse.new_zeros(1, 1) if by_lse is None else by_lse.unsqueeze(-1).to(row.lse.dtype)
    return g, u * row.counts  # an ignored row's lse is the constant 0


def gradient(by_loss: Tensor | None, by_lse: Tensor | None, problem: Problem) -> Tensor:
    """Return the gradient G of the logits [N, V] in the accumulator's dtype.

    Args:
        by_loss: the incoming gradient of the loss, a scalar or [N]; None: 0.
        by_lse: that of the log-sum-exps, [N]; None: 0.
        problem: what was reduced to the loss.
    """
    row = _rows(problem)
    g, u = _incoming(by_loss, by_lse, row)
    return row.slope * (_of_p(g, u, row, problem.options) * row.p - g * row.loss_factor * row.q)


def _of_p(g: Tensor, u: Tensor, row: _Row, options: Options) -> Tensor:
    """Return a, [N, 1]."""
    return g * (row.loss_factor * row.h + 2 * options.z_loss * row.z_factor * row.lse) + u


def second_derivative(
    direction: Tensor, by_loss: Tensor | None, by_lse: Tensor | None, problem: Problem
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the gradients of <direction, G> by `by_loss`, `by_lse` and the logits; None for an incoming None."""
    row, options = _rows(problem), problem.options
    g, u = _incoming(by_loss, by_lse, row)
    a, s = _of_p(g, u, row, options), row.loss_factor
    m = row.slope * direction
    pm = (row.p * m).sum(-1, keepdim=True)
    by_logits = row.slope * row.p * (a * (m - pm) + 2 * options.z_loss * g * row.z_factor * pm)
    if options.softcap:
        by_logits = by_logits + row.bend * direction * (a * row.p - g * s * row.q)
    of_loss = (s * row.h + 2 * options.z_loss * row.z_factor * row.lse) * pm - s * (row.q * m).sum(-1, keepdim=True)
    to_loss = None if by_loss is None else of_loss.squeeze(-1) if by_loss.dim() else of_loss.sum()
    return to_loss, None if by_lse is None else (row.counts * pm).squeeze(-1), by_logits
