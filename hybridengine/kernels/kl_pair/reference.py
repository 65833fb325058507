"""The specification of the divergence of two predictions, in plain torch.

With x = a/T and y = b/T in float32 (float64 for float64), p = softmax(x) and q = softmax(y), a row that counts has

    forward     KL(p || q) = sum_j p_j u_j             with u = log p - log q
    reverse     KL(q || p) = sum_j q_j (-u_j)
    symmetric   (forward + reverse) / 2

and a row that does not count 0. There is no factor T^2: who wants the gradient's size independent of T multiplies by
it. "sum" adds the rows, "mean" divides that by the number of rows that count. The gradients of a row by x and y, of
which those by a and b are 1/T, are

    forward     p_j (u_j - KL(p || q))                 by x       q_j - p_j                            by y
    reverse     p_j - q_j                              by x       q_j (-u_j - KL(q || p))              by y

and of "symmetric" the mean of both. `EDGE_ROWS` says what holds for infinite logits: a class that one side excludes
(-inf) and the other does not makes KL(the other || the one) infinite, one that both exclude counts as no class, and a
row without any finite logit, or with NaN or +inf, is NaN. Where KL(p || q) has a part in the loss and is infinite, no
entry of the gradient by a is finite; KL(q || p) and b likewise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["EDGE_ROWS", "REDUCTIONS", "EdgeRow", "log_probabilities", "reduced", "run", "wide_dtype"]

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}  # the numbers of `Reduction` in csrc/kl_pair/kl_pair.h

_INF, _NAN = float("inf"), float("nan")


class EdgeRow(NamedTuple):
    """A row at the edge and its divergences."""

    name: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    forward: float
    reverse: float


_LOG_2 = 0.6931471805599453

EDGE_ROWS = (
    EdgeRow("equal", (1.0, -2.0, 0.5, 3.0), (1.0, -2.0, 0.5, 3.0), 0.0, 0.0),
    EdgeRow("excluded by both", (-_INF, 1.0, 2.0, -_INF), (-_INF, 1.0, 2.0, -_INF), 0.0, 0.0),
    EdgeRow("one class left", (-_INF, 7.0, -_INF, -_INF), (-_INF, -3.0, -_INF, -_INF), 0.0, 0.0),
    EdgeRow("excluded by a", (-_INF, 0.0, -_INF, -_INF), (0.0, 0.0, -_INF, -_INF), _LOG_2, _INF),
    EdgeRow("excluded by b", (0.0, 0.0, -_INF, -_INF), (0.0, -_INF, -_INF, -_INF), _INF, _LOG_2),
    EdgeRow("excluded by each", (0.0, -_INF, 1.0, 2.0), (-_INF, 0.0, 1.0, 2.0), _INF, _INF),
    EdgeRow("nothing in common", (0.0, -_INF, -_INF, -_INF), (-_INF, 0.0, -_INF, -_INF), _INF, _INF),
    EdgeRow("unlikely, excluded by b", (0.0, -1e4, 0.0, 0.0), (0.0, -_INF, 0.0, 0.0), _INF, 0.0),
    EdgeRow("unlikely on both sides", (0.0, -1e30, -1e4, 0.0), (0.0, -1e4, -1e30, 0.0), 0.0, 0.0),
    EdgeRow("all equal and huge", (-1e30, -1e30, -1e30, -1e30), (1e30, 1e30, 1e30, 1e30), 0.0, 0.0),
    EdgeRow("no class in a", (-_INF, -_INF, -_INF, -_INF), (0.0, 1.0, 2.0, 3.0), _NAN, _NAN),
    EdgeRow("no class in b", (0.0, 1.0, 2.0, 3.0), (-_INF, -_INF, -_INF, -_INF), _NAN, _NAN),
    EdgeRow("no class", (-_INF, -_INF, -_INF, -_INF), (-_INF, -_INF, -_INF, -_INF), _NAN, _NAN),
    EdgeRow("infinite a", (0.0, _INF, 2.0, 3.0), (0.0, 1.0, 2.0, 3.0), _NAN, _NAN),
    EdgeRow("infinite b", (0.0, 1.0, 2.0, 3.0), (0.0, _INF, 2.0, 3.0), _NAN, _NAN),
    EdgeRow("infinite both", (0.0, _INF, 2.0, 3.0), (0.0, _INF, 2.0, 3.0), _NAN, _NAN),
    EdgeRow("NaN in a", (0.0, _NAN, 2.0, 3.0), (0.0, 1.0, 2.0, 3.0), _NAN, _NAN),
    EdgeRow("NaN in b", (0.0, 1.0, 2.0, 3.0), (0.0, _NAN, 2.0, 3.0), _NAN, _NAN),
    EdgeRow("NaN against an excluded class", (0.0, _NAN, 2.0, 3.0), (0.0, -_INF, 2.0, 3.0), _NAN, _NAN),
)
"""Frozen: every implementation is tested against these rows, in every direction."""


def wide_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Return what the loss is computed in: float64 if one of the two is float64, else float32."""
    return torch.promote_types(accumulator_dtype(a.dtype), accumulator_dtype(b.dtype))


def log_probabilities(logits: Tensor, mask: Tensor | None, temperature: float, dtype: torch.dtype) -> Tensor:
    """Return log softmax(logits / T) [N, V]; a row that does not count is that of equal logits."""
    if logits.dtype != dtype:
        logits = logits.to(dtype)
    if mask is not None:  # before anything is computed: 0 * NaN would be NaN in every derivative
        logits = logits.masked_fill(~mask.unsqueeze(-1), 0.0)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def _divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row [N]."""
    difference = (log_p - log_q).masked_fill(log_p == -_INF, 0.0)
    # A probability that is 0 only by rounding makes an infinite difference infinite, not NaN.
    p = log_p.exp() + torch.finfo(log_p.dtype).tiny
    return (p * difference).sum(-1)


def run(
    a: Tensor, b: Tensor, mask: Tensor | None, temperature: float, direction: str, reduction: str, empty: str
) -> Tensor:
    """Return the loss; arguments as in `kl_pair`."""
    record("kl_pair", "reference")
    dtype = wide_dtype(a, b)
    log_p, log_q = (log_probabilities(x, mask, temperature, dtype) for x in (a, b))
    if direction == "symmetric":
        rows = (_divergences(log_p, log_q) + _divergences(log_q, log_p)) / 2
    else:
        rows = _divergences(log_p, log_q) if direction == "forward" else _divergences(log_q, log_p)
    return reduced(rows, mask, REDUCTIONS[reduction], empty == "zero")


def reduced(rows: Tensor, mask: Tensor | None, reduction: int, empty_is_zero: bool) -> Tensor:
    """Return what becomes of the losses of the rows [N]; waits for no device."""
    if reduction == REDUCTIONS["none"]:
        return rows
    total = rows.sum()
    if reduction == REDUCTIONS["sum"]:
        return total
    # Over nothing the rows' gradients are 0, but a division by 0 would make NaN of them.
    nothing = 0.0 if empty_is_zero else _NAN
    if mask is None:
        return total / rows.shape[0] if rows.shape[0] else total + nothing
    count = mask.sum().to(rows.dtype)
    return torch.where(count == 0, nothing, total / count.clamp_min(1.0))
