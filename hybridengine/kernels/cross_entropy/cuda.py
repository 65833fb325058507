"""Cross-entropy on NVIDIA GPUs by the CUDA library: `csrc/cross_entropy/cuda.cu`, where the formula is derived.

The functions queue one kernel on the current stream and wait for nothing. They take what `triton_kernel` takes.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from hybridengine.kernels import cuda_library
from hybridengine.kernels.cross_entropy.layout import check_rows, check_values
from hybridengine.kernels.cross_entropy.options import is_soft

__all__ = ["backward", "forward"]

# The numbers of `TargetKind` in csrc/cross_entropy/cuda.cuh.
_LABELS, _SOFT, _SOFT_FLOAT = 0, 1, 2


class _Problem(ctypes.Structure):
    """`CrossEntropyProblem` of csrc/cross_entropy/cuda.cuh, field by field."""

    _fields_ = [
        ("element", ctypes.c_int),
        ("target_kind", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_sum", ctypes.c_double),
        ("ignore_index", ctypes.c_int64),
        ("smoothing", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("z_loss", ctypes.c_double),
        ("factors", ctypes.c_void_p),
        ("factors_stride", ctypes.c_int64),
        ("loss", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("grad_loss", ctypes.c_void_p),
        ("grad_loss_stride", ctypes.c_int64),
        ("grad_lse", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("gradient_stride", ctypes.c_int64),
        ("flag", ctypes.c_void_p),
    ]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _problem(
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
    gradient: Tensor | None,
) -> _Problem:
    """Return what both passes are told."""
    check_rows(logits, target, weight, gradient)
    if gradient is not None and gradient.dtype != logits.dtype:
        raise ValueError(f"the gradient must be {logits.dtype} like the logits, not {gradient.dtype}")
    kind = (_SOFT if target.dtype == logits.dtype else _SOFT_FLOAT) if is_soft(target) else _LABELS
    return _Problem(
        element=cuda_library.ELEMENT_TYPES[logits.dtype],
        target_kind=kind,
        rows=logits.shape[0],
        classes=logits.shape[1],
        logits=logits.data_ptr(),
        logits_stride=logits.stride(0),
        target=target.data_ptr(),
        target_stride=target.stride(0),
        weight=_address(weight),
        weight_sum=weight_sum,
        ignore_index=ignore_index,
        smoothing=smoothing,
        scale=scale,
        softcap=softcap,
        z_loss=z_loss,
        factors=factors.data_ptr(),
        factors_stride=factors.stride(0) if factors.dim() == 2 else 0,
        lse=lse.data_ptr(),
        gradient=_address(gradient),
        gradient_stride=0 if gradient is None else gradient.stride(0),
    )


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

    Args:
        logits: [N, V] of float32, bfloat16 or float16, each row contiguous.
        target: int64 [N], or soft targets [N, V] of float32 or the logits' dtype.
        weight: float32 [V].
        weight_sum: its sum; V where there is none.
        ignore_index: rows with this label get 0 everywhere, whatever they hold.
        smoothing: in [0, 1].
        scale: multiplies the logits.
        softcap: y = softcap tanh(scale x / softcap); 0 for none.
        z_loss: z of the term z lse^2.
        factors: float32 [2], or [N, 2] for each row its own, on the device: what multiplies the loss, and the z term.
        loss: float32 [N], written.
        lse: float32 [N], written.
        gradient: like the logits, written; may be the logits themselves.
        flag: see `layout`.

    Raises:
        RuntimeError: if the kernel cannot be launched.
        ValueError: for a wrong dtype, shape or layout.
    """
    problem = _problem(
        logits, target, weight, weight_sum, ignore_index, smoothing, scale, softcap, z_loss, factors, lse, gradient
    )
    check_values(len(logits), loss, lse)
    problem.loss = loss.data_ptr()
    problem.flag = _address(flag)
    cuda_library.library().launch("cross_entropy_forward", problem, logits.device)


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
    """Write the gradient for the incoming gradients of `forward`'s outputs; arguments as there, besides:

    Args:
        lse: as `forward` wrote it, read.
        grad_loss: float32 [N], or [] for one that all rows share.
        grad_lse: float32 [N] or None.
        gradient: like the logits, written; may be the logits themselves.

    A label that is no class is treated as ignored; `forward` has noted it.

    Raises:
        RuntimeError: if the kernel cannot be launched.
        ValueError: for a wrong dtype, shape or layout.
    """
    problem = _problem(
        logits, target, weight, weight_sum, ignore_index, smoothing, scale, softcap, z_loss, factors, lse, gradient
    )
    check_values(len(logits), lse, grad_lse)
    problem.grad_loss = grad_loss.data_ptr()
    problem.grad_loss_stride = grad_loss.stride(0) if grad_loss.dim() else 0
    problem.grad_lse = _address(grad_lse)
    cuda_library.library().launch("cross_entropy_backward", problem, logits.device)
