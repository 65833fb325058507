"""The specification of cross-entropy, in plain torch.

For a row x of V logits, in float32 (float64 for float64 logits):

    y = c tanh(k x / c)  with scale k and softcap c, or k x without a softcap;      lse = log sum_j exp(y_j)
    p = exp(y - lse);       q_j = w_j ((1 - e) [j = t] + e / V)  for a label t, class weights w (1 if none), smoothing e
                            q_j = w_j ((1 - e) t_j + e / V)      for probabilities t

    loss = sum_j q_j (lse - y_j) + z lse^2;       d loss / d x_j = dy_j/dx_j ((h + 2 z lse) p_j - q_j),  h = sum_j q_j

A class with q_j = 0 adds nothing, whatever its logit. A row whose label is `ignore_index` has loss 0, lse 0 and
gradient 0, whatever it holds. "sum" adds the rows. "mean" divides the sum of the first term by the summed w_t of the
rows that count (by their number for probabilities), the z term by their number; over nothing it is NaN, or 0 if asked
for, and its gradient 0.

Edges, the same in every implementation (NaN = loss, lse and gradient are NaN):

    +inf or NaN among the logits, or all -inf     NaN
    one class at -inf                             p = 0 there; the loss is +inf if q > 0 there
    all -1e30                                     an ordinary row of equal logits
    V = 1                                         loss 0, gradient 0
    N = 0, or every row ignored                   "sum" 0, "mean" as above
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.cross_entropy.options import REDUCTIONS, Options, bad_label, factors, is_soft, without_ignored
from hybridengine.kernels.dispatch import record

__all__ = ["capped", "may_ignore", "run"]

_torch_cross_entropy: Callable[..., Tensor] = torch._C._nn.cross_entropy_loss


def run(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss and, if wanted, each row's log-sum-exp; arguments as in `cross_entropy`."""
    record("cross_entropy", "reference")
    dtype = native.accumulator_dtype(logits.dtype)
    x = logits if logits.dtype == dtype else logits.to(dtype)
    w = weight if weight is None or weight.dtype == dtype else weight.to(dtype)
    if not is_soft(target):
        if may_ignore(target, x.shape[-1], options.ignore_index):
            x = without_ignored(x, target, options.ignore_index)
        if options.is_plain and not want_lse and (w is None or options.label_smoothing == 0.0):
            return _torchs_own(x, target, w, options), None
    return _in_full(x, target, w, options)


def capped(x: Tensor, options: Options) -> Tensor:
    """Return the logits with scale and softcap."""
    y = x * options.scale if options.scale != 1.0 else x
    return torch.tanh(y / options.softcap) * options.softcap if options.softcap else y


def _torchs_own(x: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """What `torch.nn.functional.cross_entropy` calls after its checks; small losses feel the difference."""
    # Torch's mean has a gradient of NaN where the summed weight is 0; over no row at all, 0.
    by_hand = options.reduction == REDUCTIONS["mean"] and (options.empty_is_zero or weight is not None)
    reduction = REDUCTIONS["sum"] if by_hand else options.reduction
    loss = _torch_cross_entropy(x, target, weight, reduction, options.ignore_index, options.label_smoothing)
    if not by_hand:
        return loss
    by_loss, _, nothing = factors(x, target, weight, options)
    return loss * by_loss + nothing


def _in_full(x: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    uniform = options.label_smoothing / x.shape[-1]
    y = capped(x, options)
    surprise = -torch.log_softmax(y, -1)  # subtracts the maximum first: lse - y would be 0 for logits around 1e30
    top = y.argmax(-1, keepdim=True)
    lse = (y.gather(-1, top) + surprise.gather(-1, top)).squeeze(-1)  # `logsumexp` has a wrong gradient around 1e30
    w = x.new_ones(x.shape[-1]) if weight is None else weight
    if is_soft(target):
        rows = _expected(surprise, ((1 - options.label_smoothing) * target.to(x.dtype) + uniform) * w)
    else:
        counted = target != options.ignore_index
        label = target.masked_fill(~counted, 0)
        rows = _expected(surprise.gather(-1, label.unsqueeze(-1)), ((1 - options.label_smoothing) * w[label])[:, None])
        if uniform:
            rows = rows + _expected(surprise, uniform * w)
        rows, lse = torch.where(counted, rows, 0), torch.where(counted, lse, 0)
    by_loss, by_z, nothing = factors(x, target, weight, options)
    rows = rows * by_loss + options.z_loss * by_z * lse.square() if options.z_loss else rows * by_loss
    return rows if options.reduction == REDUCTIONS["none"] else rows.sum() + nothing, lse


def _expected(surprise: Tensor, q: Tensor) -> Tensor:
    return torch.where(q == 0, 0, q * surprise).sum(-1)


def may_ignore(target: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether a row may be ignored; on a CPU that is looked up, and every label checked.

    Raises:
        IndexError: for a label that is neither a class nor `ignore_index`.
    """
    if torch.compiler.is_compiling() or not target.is_cpu or torch._C._are_functorch_transforms_active():
        return True
    if native.why_missing() is None and target.is_contiguous():
        rows = target.shape[0]  # `len` takes most of a microsecond
        return native.module().label_totals(0, target.data_ptr(), 0, rows, classes, ignore_index)[0] < rows
    ignored = target == ignore_index
    bad = ~ignored & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(bad_label(row, int(target[row]), classes, ignore_index))
    return bool(ignored.any())
