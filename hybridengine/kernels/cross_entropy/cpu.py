"""Cross-entropy on the CPU by the native library: `csrc/cross_entropy/`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.cross_entropy.autograd import REDUCTIONS, run_operator
from hybridengine.kernels.cross_entropy.derivatives import Options
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.modes import forward_mode

__all__ = ["run", "why_missing", "why_not", "why_slower"]

why_missing = native.why_missing

# Below these torch's own kernels are faster (`hybridengine bench`): short rows waste the vector tails, and few
# elements do not pay for one more Python call.
_FEWEST_CLASSES = 64
_FEWEST_ELEMENTS = 131072


def why_slower(logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> str | None:
    """Say why plain torch is faster for this shape."""
    classes = logits.shape[1]
    if classes < _FEWEST_CLASSES:
        return f"fewer than {_FEWEST_CLASSES} classes: plain torch is faster"
    if logits.shape[0] * classes < _FEWEST_ELEMENTS:
        return f"fewer than {_FEWEST_ELEMENTS} logits: plain torch is faster"
    return None


def why_not(logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> str | None:
    """Say why these arguments cannot run here."""
    if logits.device.type != "cpu":
        return f"the logits are on {logits.device.type}, not on the CPU"
    if logits.dtype not in native.ELEMENT_TYPES:
        return f"the logits are {logits.dtype}; it takes float32, bfloat16 and float64"
    if target.dtype != torch.int64 or target.device.type != "cpu":
        return f"the target is {target.dtype} on {target.device.type}; it takes int64 on the CPU"
    if not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing={label_smoothing} is not in [0, 1]"
    if logits.shape[1] == 0:
        return "there are no classes"
    if forward_mode():
        return "forward-mode differentiation is on (torch.func.jvp, jacfwd, hessian); only plain torch has it"
    if weight is not None:
        return _why_not_weight(weight, logits.shape[1], label_smoothing)
    return None


def _why_not_weight(weight: Tensor, classes: int, label_smoothing: float) -> str | None:
    if label_smoothing != 0.0:
        return "class weights together with label smoothing"
    if weight.shape != (classes,) or weight.device.type != "cpu":
        return f"the weight has shape {tuple(weight.shape)} on {weight.device.type}, expected ({classes},) on the CPU"
    if weight.requires_grad:
        return "a gradient of the class weights is wanted"
    return None


def run(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    empty: str,
) -> Tensor:
    """Return the loss; arguments as in `cross_entropy`."""
    options = Options(ignore_index, float(label_smoothing), REDUCTIONS[reduction], empty == "zero")
    return run_operator(logits, target, weight, options)


def _operator(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    empty_is_zero: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The operator's kernel: checked tensors in, addresses to the library."""
    record("cross_entropy", "cpu")
    rows, classes = logits.shape
    dtype = native.accumulator_dtype(logits.dtype)
    if logits.stride(1) != 1 and classes > 1:
        logits = logits.contiguous()
    target = target.contiguous()
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    loss = torch.empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    gradient = native.empty((rows, classes) if want_gradient else (0,), logits.dtype)
    native.module().cross_entropy(
        native.ELEMENT_TYPES[logits.dtype],
        logits.data_ptr(),
        logits.stride(0),
        target.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        rows,
        classes,
        ignore_index,
        label_smoothing,
        reduction,
        empty_is_zero,
        loss.data_ptr(),
        gradient.data_ptr() if want_gradient else 0,
    )
    return loss, gradient


operators.implement("cross_entropy", "cpu", _operator)
