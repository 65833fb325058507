"""The divergence of two predictions on the CPU by the native library: `csrc/kl_pair/`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.kl_pair.autograd import run_operator
from hybridengine.kernels.kl_pair.derivatives import DIRECTIONS, REDUCTIONS, Options
from hybridengine.kernels.modes import forward_mode

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(a: Tensor, b: Tensor, mask: Tensor | None) -> str | None:
    """Say why these arguments cannot run here."""
    if not (a.is_cpu and b.is_cpu and (mask is None or mask.is_cpu)):
        return "a tensor is not on the CPU"
    if a.dtype != b.dtype:
        return f"the logits are {a.dtype} and {b.dtype}; it takes two of one kind"
    if a.dtype not in native.ELEMENT_TYPES:
        return f"the logits are {a.dtype}; it takes float32, bfloat16 and float64"
    if a.shape[1] == 0:
        return "there are no classes"
    if forward_mode():
        return "forward-mode differentiation is on (torch.func.jvp, jacfwd, hessian); only plain torch has it"
    return None


def run(
    a: Tensor, b: Tensor, mask: Tensor | None, temperature: float, direction: str, reduction: str, empty: str
) -> Tensor:
    """Return the loss; arguments as in `kl_pair`."""
    options = Options(float(temperature), DIRECTIONS[direction], REDUCTIONS[reduction], empty == "zero")
    return run_operator(a, b, mask, "cpu", options)


def _operator(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    temperature: float,
    direction: int,
    reduction: int,
    empty_is_zero: bool,
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's kernel: checked tensors in, addresses to the library."""
    record("kl_pair", "cpu")
    rows, classes = a.shape
    if classes > 1:
        a = a if a.stride(1) == 1 else a.contiguous()
        b = b if b.stride(1) == 1 else b.contiguous()
    if mask is not None:
        mask = mask.contiguous()
    loss = torch.empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=native.accumulator_dtype(a.dtype))
    by_a = native.empty((rows, classes) if want_a else (0,), a.dtype)
    by_b = native.empty((rows, classes) if want_b else (0,), a.dtype)
    first = (a.data_ptr(), a.stride(0), by_a.data_ptr() if want_a else 0)
    second = (b.data_ptr(), b.stride(0), by_b.data_ptr() if want_b else 0)
    if direction == DIRECTIONS["reverse"]:  # is forward with the two exchanged
        first, second = second, first
    native.module().kl_pair(
        native.ELEMENT_TYPES[a.dtype],
        first,
        second,
        0 if mask is None else mask.data_ptr(),
        rows,
        classes,
        temperature,
        direction == DIRECTIONS["symmetric"],
        reduction,
        empty_is_zero,
        loss.data_ptr(),
    )
    return loss, by_a, by_b


operators.implement("kl_pair", "cpu", _operator)
