"""The divergence of two predictions by Triton, on a GPU or in its interpreter: `triton_kernel.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels import operators, triton_runtime
from hybridengine.kernels.kl_pair.autograd import run_operator
from hybridengine.kernels.kl_pair.derivatives import DIRECTIONS, REDUCTIONS, Options
from hybridengine.kernels.modes import forward_mode

__all__ = ["run", "why_missing", "why_not", "why_slower"]

why_missing = triton_runtime.why_missing

# On an H100 a call costs the host as much as plain torch takes for some million logits, where rows are short.
_FEWEST_CLASSES, _FEWEST_ELEMENTS = 128, 1 << 20

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_slower(a: Tensor, b: Tensor, mask: Tensor | None) -> str | None:
    """Say why plain torch is taken for this shape."""
    if a.shape[1] < _FEWEST_CLASSES and a.numel() < _FEWEST_ELEMENTS:
        return f"fewer than {_FEWEST_CLASSES} classes and {_FEWEST_ELEMENTS} logits: plain torch"
    return triton_runtime.why_slower()


def why_not(a: Tensor, b: Tensor, mask: Tensor | None) -> str | None:
    """Say why these arguments cannot run here."""
    if (reason := triton_runtime.why_not_on(a, b, mask)) is not None:
        return reason
    if a.dtype not in _DTYPES or b.dtype not in _DTYPES:
        return f"the logits are {a.dtype} and {b.dtype}; it takes float32, bfloat16 and float16"
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
    return run_operator(a, b, mask, "triton", options)


operators.implement("kl_pair", "triton", operators.later("hybridengine.kernels.kl_pair.triton_kernel", "launch"))
