"""Cross-entropy in Triton: launches the kernels of `triton_rows`.

The functions take what `cuda` takes, queue one kernel on the current stream and wait for nothing. They run on any GPU
that Triton knows, and on CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from hybridengine.kernels.cross_entropy.layout import check_rows, check_values
from hybridengine.kernels.cross_entropy.options import is_soft
from hybridengine.kernels.cross_entropy.triton_row import LABELS, SMOOTHED, SOFT
from hybridengine.kernels.cross_entropy.triton_rows import backward_rows, forward_rows

__all__ = ["backward", "constants", "forward", "launch_options", "target_kind"]

_SMALLEST_BLOCK = 16
# Measured on an H100 from 30,522 to 128,256 classes: 8 columns a thread, read 16 bytes at a time, in as many warps as a
# block may have.
_LARGEST_BLOCK, _COLUMNS_PER_WARP = 8192, 256
# Targets for every class take more registers, which fewer warps have.
_LARGEST_DENSE_BLOCK = 2048


def launch_options(classes: int, target_kind: int) -> dict[str, Any]:
    """Return how many columns a program reads at once, and by how many warps."""
    largest = _LARGEST_BLOCK if target_kind == LABELS.value else _LARGEST_DENSE_BLOCK
    block = min(max(triton.next_power_of_2(classes), _SMALLEST_BLOCK), largest)
    return {
        "BLOCK": block,
        "num_warps": max(block // _COLUMNS_PER_WARP, 1),
        # A contracted `scale * x - maximum` would leave the rounding error of the maximum: 1e22 at 1e30.
        "enable_fp_fusion": False,
    }


def _guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' own is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def constants(classes: int, smoothing: float, scale: float, softcap: float) -> dict[str, float]:
    """Return what the formula of a row takes beside its tensors."""
    return {
        "kept": 1.0 - smoothing,
        "uniform": smoothing / classes,
        "scale": float(scale),
        "inner": scale / softcap if softcap > 0 else 0.0,
        "softcap": float(softcap),
    }


def target_kind(target: Tensor, smoothing: float) -> int:
    kind: int = (SOFT if is_soft(target) else SMOOTHED if smoothing else LABELS).value
    return kind


def forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_sum: float,
    ignore_index: int,
    smoothing: float,
    scale: float,
    softcap: float,
    z_loss: float,
    factors: Tensor,
    loss: Tensor,
    lse: Tensor,
    gradient: Tensor | None,
    flag: Tensor | None,
) -> None:
    """Write the loss and logsumexp of each row, and the unit gradient if `gradient` is given.

    Arguments and errors are those of `cuda.forward`, but the gradient may have any of the three dtypes.
    """
    check_rows(logits, target, weight, gradient)
    rows, classes = logits.shape
    check_values(rows, loss, lse)
    if rows == 0 or classes == 0:
        return
    kind = target_kind(target, smoothing)
    with _guard(logits.device):
        forward_rows[(rows,)](
            logits,
            logits.stride(0),
            target,
            target.stride(0),
            weight,
            factors,
            factors.stride(0) if factors.dim() == 2 else 0,
            loss,
            lse,
            gradient,
            0 if gradient is None else gradient.stride(0),
            flag,
            ignore_index,
            classes,
            **constants(classes, smoothing, scale, softcap),
            dense_mass=smoothing / classes * weight_sum,
            z_loss=float(z_loss),
            TARGET=kind,
            WEIGHTED=weight is not None,
            CAPPED=softcap > 0,
            Z=z_loss != 0,
            GRADIENT=gradient is not None,
            FLAGGED=flag is not None,
            **launch_options(classes, kind),
        )


def backward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_sum: float,
    ignore_index: int,
    smoothing: float,
    scale: float,
    softcap: float,
    z_loss: float,
    factors: Tensor,
    lse: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    gradient: Tensor,
) -> None:
    """Write the gradient for the incoming gradients of `forward`'s outputs.

    Arguments and errors are those of `cuda.backward`, but the gradient may have any of the three dtypes.
    """
    check_rows(logits, target, weight, gradient)
    rows, classes = logits.shape
    check_values(rows, lse, grad_lse)
    if rows == 0 or classes == 0:
        return
    kind = target_kind(target, smoothing)
    with _guard(logits.device):
        backward_rows[(rows,)](
            logits,
            logits.stride(0),
            target,
            target.stride(0),
            weight,
            factors,
            factors.stride(0) if factors.dim() == 2 else 0,
            lse,
            grad_loss,
            grad_loss.stride(0) if grad_loss.dim() else 0,
            grad_lse,
            gradient,
            gradient.stride(0),
            ignore_index,
            classes,
            **constants(classes, smoothing, scale, softcap),
            dense_mass=smoothing / classes * weight_sum,
            z_loss=float(z_loss),
            TARGET=kind,
            WEIGHTED=weight is not None,
            CAPPED=softcap > 0,
            Z=z_loss != 0,
            LSE_GRADIENT=grad_lse is not None,
            **launch_options(classes, kind),
        )
