"""Cross-entropy on the CPU by the native library: `csrc/cross_entropy/`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.cross_entropy.autograd import run_operator
from hybridengine.kernels.cross_entropy.options import REDUCTIONS, Options, is_soft
from hybridengine.kernels.cross_entropy.quick import why_slower_for
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.modes import forward_mode

__all__ = ["Factors", "check_labels", "launch", "reduced", "run", "why_missing", "why_not", "why_slower"]

why_missing = native.why_missing
run = partial(run_operator, "cpu")


def why_slower(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> str | None:
    """Say why plain torch is faster for this shape."""
    return why_slower_for(*logits.shape)


def why_not(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> str | None:
    """Say why these arguments cannot run here."""
    if logits.device.type != "cpu":
        return f"the logits are on {logits.device.type}, not on the CPU"
    if logits.dtype not in native.ELEMENT_TYPES:
        return f"the logits are {logits.dtype}; it takes float32, bfloat16 and float64"
    if target.device.type != "cpu":
        return f"the target is on {target.device.type}, not on the CPU"
    if target.requires_grad or (weight is not None and weight.requires_grad):
        return "a gradient of the targets or of the class weights is wanted"
    if weight is not None and weight.device.type != "cpu":
        return f"the weight is on {weight.device.type}, not on the CPU"
    if logits.shape[1] == 0:
        return "there are no classes"
    if forward_mode():
        return "forward-mode differentiation is on (torch.func.jvp, jacfwd, hessian); only plain torch has it"
    return None


class Factors(NamedTuple):
    """What each row's loss and z term are multiplied by, and what the loss is if that is nothing."""

    loss: float
    z: float
    empty: bool


def check_labels(target: Tensor, weight: Tensor | None, classes: int, options: Options, element: int) -> Factors:
    """Return the factors of the reduction.

    Args:
        target: contiguous; [N] labels or [N, V] probabilities.
        weight: contiguous accumulators, or None.

    Raises:
        IndexError: for a label that is neither a class nor `ignore_index`.
    """
    rows, total = len(target), float(len(target))
    if not is_soft(target):
        address = 0 if weight is None else weight.data_ptr()
        rows, total = native.module().label_totals(
            element, target.data_ptr(), address, rows, classes, options.ignore_index
        )
    if options.reduction != REDUCTIONS["mean"]:
        return Factors(1.0, 1.0, False)
    # Over nothing the gradient is 0, also where the loss is NaN: such a batch must not destroy the weights.
    return Factors(1.0 / total if total else 0.0, 1.0 / rows if rows else 0.0, total == 0.0)


def launch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    factors: Factors,
    *,
    loss: Tensor | None = None,
    lse: Tensor | None = None,
    gradient: Tensor | None = None,
    by_loss: Tensor | None = None,
    by_lse: Tensor | None = None,
) -> None:
    """Fill `loss` [N], `lse` [N] and `gradient` [N, V], each unless None.

    Args:
        logits: [N, V], rows contiguous.
        target: [N] labels, checked, or [N, V] accumulators; contiguous.
        weight: [V] accumulators, contiguous, or None.
        gradient: rows contiguous; may be the logits.
        by_loss: what comes in for the losses, a scalar or [N] accumulators; None: 1.
        by_lse: what comes in for the log-sum-exps, [N] accumulators, contiguous; None: 0.
    """
    rows, classes = logits.shape
    soft = is_soft(target)
    native.module().cross_entropy(
        (native.ELEMENT_TYPES[logits.dtype], logits.data_ptr(), logits.stride(0), rows, classes),
        (
            0 if soft else target.data_ptr(),
            target.data_ptr() if soft else 0,
            _address(weight),
            options.ignore_index,
        ),
        (options.label_smoothing, options.scale, options.softcap, options.z_loss, factors.loss, factors.z),
        _address(gradient),
        0 if gradient is None else gradient.stride(0),
        _address(by_loss),
        by_loss.stride(0) if by_loss is not None and by_loss.dim() else 0,
        _address(by_lse),
        _address(loss),
        _address(lse),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ready(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Factors]:
    """Return what `launch` reads: rows contiguous, accumulators where it wants them, labels checked."""
    dtype = native.accumulator_dtype(logits.dtype)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    target = (target.to(dtype) if is_soft(target) else target).contiguous()
    weight = None if weight is None else weight.to(dtype).contiguous()
    element = native.ELEMENT_TYPES[logits.dtype]
    return logits, target, weight, check_labels(target, weight, logits.shape[1], options, element)


def reduced(rows: Tensor, options: Options, factors: Factors) -> Tensor:
    """Return the loss of row losses [N]; they hold their factors already."""
    if options.reduction == REDUCTIONS["none"]:
        return rows
    nothing = float("nan") if factors.empty and not options.empty_is_zero else 0.0
    total = native.module().sum_in_order(native.ELEMENT_TYPES[rows.dtype], rows.data_ptr(), len(rows))
    return rows.new_full((), total + nothing)


def _forward(logits: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    record("cross_entropy", "cpu")
    options, want_gradient = Options(*rest[:-1]), rest[-1]
    gradient = native.empty(tuple(logits.shape) if want_gradient else (0,), logits.dtype)
    loss, lse = _run(logits, target, weight, options, gradient if want_gradient else None)
    return loss, lse, gradient


def _forward_in_place(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    record("cross_entropy", "cpu")
    return _run(logits, target, weight, Options(*options), logits)


def _run(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits, target, weight, factors = _ready(logits, target, weight, options)
    rows = torch.empty(len(logits), dtype=native.accumulator_dtype(logits.dtype))
    lse = torch.empty_like(rows)
    launch(logits, target, weight, options, factors, loss=rows, lse=lse, gradient=gradient)
    return reduced(rows, options, factors), lse


def _backward(
    by_loss: Tensor | None, by_lse: Tensor | None, logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> Tensor:
    record("cross_entropy", "cpu")
    dtype = native.accumulator_dtype(logits.dtype)
    gradient = native.empty(tuple(logits.shape), logits.dtype)
    logits, target, weight, factors = _ready(logits, target, weight, Options(*options))
    by_loss = torch.zeros((), dtype=dtype) if by_loss is None else by_loss.to(dtype)
    by_lse = None if by_lse is None else by_lse.to(dtype).contiguous()
    launch(logits, target, weight, Options(*options), factors, gradient=gradient, by_loss=by_loss, by_lse=by_lse)
    return gradient


operators.implement("cross_entropy", "cpu", _forward)
operators.implement("cross_entropy_", "cpu", _forward_in_place)
operators.implement("cross_entropy_backward", "cpu", _backward)
