"""Multiplying a gradient by what comes in for the loss, at no cost where that is 1: after every `loss.backward()`.

The loss's forward pass has written the gradient for an incoming gradient of 1. To multiply it all the same would read
and write it once more; to ask the device whether it must would make the host wait.
"""

from __future__ import annotations

from torch import Tensor

from hybridengine.kernels import native, operators, triton_runtime

__all__ = ["scale_rows"]

_launch = operators.later("hybridengine.kernels.triton_scaling", "scale_rows")


def scale_rows(matrix: Tensor, factor: Tensor) -> None:
    """Multiply the rows of `matrix` [N, V], contiguous, by `factor` (a scalar or [N]) in place.

    Rows whose factor is 1 are not touched by the native library and by Triton.
    """
    on_cpu = matrix.device.type == "cpu"
    if on_cpu and matrix.dtype in native.ELEMENT_TYPES and native.why_missing() is None:
        factor = factor.to(native.accumulator_dtype(matrix.dtype))
        stride = factor.stride(0) if factor.dim() else 0
        element = native.ELEMENT_TYPES[matrix.dtype]
        rows, classes = matrix.shape
        native.module().scale_rows(element, matrix.data_ptr(), rows, classes, factor.data_ptr(), stride)
    elif not on_cpu and not triton_runtime.why_missing() and matrix.is_contiguous() and matrix.dtype.itemsize <= 4:
        _launch(matrix, factor)
    else:
        # `data`: the check of saved tensors must not see it, as it does not see the other two.
        matrix.data.mul_(factor.unsqueeze(-1) if factor.dim() else factor)
