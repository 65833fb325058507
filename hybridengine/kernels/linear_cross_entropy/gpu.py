"""Linear cross-entropy on a GPU: cuBLAS's matrix products around the row kernels of `cross_entropy`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine.kernels import triton_runtime
from hybridengine.kernels.cross_entropy.gpu import RowProblem
from hybridengine.kernels.cross_entropy.options import REDUCTIONS, Options, bad_label, factors, is_soft
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.linear_cross_entropy import blocked, chunked
from hybridengine.kernels.linear_cross_entropy.autograd import implement, run_operator
from hybridengine.kernels.linear_cross_entropy.products import Half, Products, Wide
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, Split, Wanted, counted_rows
from hybridengine.kernels.modes import why_not_transformed

__all__ = ["run_cuda", "run_triton", "why_not_cuda", "why_not_triton", "why_slower"]

# A guess until it is measured: below, the logits of all rows are small and one product is faster than any loop.
_FEWEST_LOGITS = 1 << 24

run_cuda = partial(run_operator, "cuda")
run_triton = partial(run_operator, "triton")


def why_slower(head: Head, options: Options) -> str | None:
    """Say why plain torch is taken for this shape."""
    if len(head.x) * len(head.weight) < _FEWEST_LOGITS:
        return f"fewer than {_FEWEST_LOGITS} logits: plain torch"
    return triton_runtime.why_slower()


def why_not_triton(head: Head, options: Options) -> str | None:
    """Say why Triton cannot run these arguments."""
    return triton_runtime.why_not_on(*head) or _why_not(head)


def why_not_cuda(head: Head, options: Options) -> str | None:
    """Say why the CUDA library cannot run these arguments."""
    if any(one is not None and one.device.type != "cuda" for one in head):
        return "a tensor is not on a GPU"
    return _why_not(head)


def _why_not(head: Head) -> str | None:
    if any(one is not None and one.dtype == torch.float64 for one in head[:3]):
        return "a tensor is float64"
    if any(one is not None and one.requires_grad for one in head[3:]):
        return "a gradient of the targets or of the class weights is wanted"
    if len(head.weight) == 0:
        return "there are no classes"
    return why_not_transformed(*(one for one in head if one is not None))


class _Rows:
    """A row kernel of a GPU as a `RowKernel`."""

    def __init__(self, impl: str, head: Head, options: Options, by: Tensor) -> None:
        self.impl, self.head, self.options, self.by = impl, head, options, by

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        loss: Tensor,
        lse: Tensor,
        want_gradient: bool,
        by_loss: Tensor | None,
        by_lse: Tensor | None,
    ) -> None:
        problem = RowProblem(self.impl, target, self.head.class_weight, logits.shape[1], self.options, self.by)
        if by_lse is not None and want_gradient:
            problem.run(logits, loss, lse, None)
            coming = logits.new_ones(()) if by_loss is None else by_loss
            problem.run_backward(logits, lse, coming, by_lse, logits)
            return
        problem.run(logits, loss, lse, logits if want_gradient else None)
        if by_loss is not None and want_gradient:
            logits.mul_(by_loss.unsqueeze(-1) if by_loss.dim() else by_loss)


def _products(head: Head) -> Products:
    """On tensor cores where x is in half precision or autocast would have made it so; they are a GPU's alone."""
    device = head.x.device.type
    dtype = head.x.dtype
    if torch.is_autocast_enabled(device) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(device)
    if device != "cuda" or dtype.itemsize > 2:
        return Wide(head.weight, torch.float32)
    return Half(head.weight, dtype)


def _run(
    impl: str,
    head: Head,
    options: Options,
    split: Split,
    wanted: Wanted,
    by_loss: Tensor | None = None,
    by_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    record("linear_cross_entropy", impl)
    loss_factor, z_factor, nothing = factors(head.x, head.target, head.class_weight, options)
    _check_labels(head.target, len(head.weight), options.ignore_index)
    index = counted_rows(head.target, options.ignore_index)
    products = _products(head)
    with torch.autocast(head.x.device.type, enabled=False):  # its casts would round what is to be exact
        if split.block_classes:
            by = (loss_factor, z_factor)
            loss, lse, gradients = blocked.run(head, index, options, split.block_classes, wanted, by, by_loss, by_lse)
        else:
            rows = _Rows(impl, head, options, torch.stack((loss_factor, z_factor)))
            loss, lse, gradients = chunked.run(rows, products, head, index, split.chunk_rows, wanted, by_loss, by_lse)
    return loss if options.reduction == REDUCTIONS["none"] else loss.sum() + nothing, lse, gradients


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Refuse a label that is no class. To skip rows the host has to wait for the device anyway."""
    if is_soft(target):
        return
    bad = ((target != ignore_index) & ((target < 0) | (target >= classes))).nonzero()
    if len(bad):
        raise IndexError(bad_label(int(bad[0]), int(target[bad[0]]), classes, ignore_index))


for _impl in ("cuda", "triton"):
    implement(_impl, partial(_run, _impl))
