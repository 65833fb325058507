"""Linear cross-entropy on a GPU: cuBLAS's matrix products around the row kernels of `cross_entropy`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine.kernels import triton_runtime
from hybridengine.kernels.cross_entropy.gpu import RowProblem, row_factors, times_rows
from hybridengine.kernels.cross_entropy.options import REDUCTIONS, Options, bad_label, is_soft
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.linear_cross_entropy import blocked, chunked
from hybridengine.kernels.linear_cross_entropy.autograd import implement, run_operator
from hybridengine.kernels.linear_cross_entropy.chunks import rows_without_sum
from hybridengine.kernels.linear_cross_entropy.gpu_blocked import Blocks
from hybridengine.kernels.linear_cross_entropy.products import Narrow, Products, Wide
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, Split, Wanted
from hybridengine.kernels.modes import why_not_transformed

__all__ = ["product_dtype", "run_cuda", "run_triton", "why_not_cuda", "why_not_triton", "why_slower", "why_slower_cuda"]

# On an H100 plain torch with a float32 loss is faster below some 1,500 rows of 30,522 classes, whose logits take little
# memory.
_FEWEST_LOGITS = 3 << 24

run_cuda = partial(run_operator, "cuda")
run_triton = partial(run_operator, "triton")


def why_slower_cuda(head: Head, options: Options) -> str | None:
    """Say why plain torch or Triton is taken for this shape."""
    can_triton = triton_runtime.why_missing() is None and why_not_triton(head, options) is None
    if can_triton and product_dtype(head).itemsize == 2:
        return "Triton writes the gradient in half precision at once"
    return why_slower(head, options)


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
        """`by`: float32 [2], the factors of each row's loss and z term."""
        self.impl, self.by = impl, by
        self.problem = RowProblem(impl, head.target, head.class_weight, len(head.weight), options, by, checked=True)

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        loss: Tensor,
        lse: Tensor,
        gradient: Tensor | None,
        by_loss: Tensor | None,
        by_lse: Tensor | None,
    ) -> None:
        by = self.by if by_loss is None or by_lse is not None else times_rows(self.by, by_loss)
        problem = self.problem.of_rows(target, by)
        # The CUDA library writes a gradient in the logits' dtype alone.
        into = logits if gradient is not None and self.impl == "cuda" else gradient
        problem.run(logits, loss, lse, None if by_lse is not None else into)
        if by_lse is not None and into is not None:
            coming = logits.new_ones(()) if by_loss is None else by_loss
            problem.run_backward(logits, lse, coming, by_lse, into)
        if gradient is not None and into is not None and into is not gradient:
            gradient.copy_(into)


def product_dtype(head: Head) -> torch.dtype:
    """Return in what a GPU multiplies: half precision where x is, or where autocast would have made it so."""
    if torch.is_autocast_enabled(head.x.device.type) and head.x.dtype == torch.float32:
        return torch.get_autocast_dtype(head.x.device.type)
    return head.x.dtype


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
    by, nothing, totals = row_factors(head.target, head.class_weight, len(head.weight), options)
    index, factor = _look_at(head, options, by, totals)
    products = _products(head, split.dtype, factor)
    with torch.autocast(head.x.device.type, enabled=False):  # its casts would round what is to be exact
        if split.block_classes:
            without_triton = triton_runtime.why_missing() is not None
            passes = None if without_triton else Blocks(products)
            products = Wide(head.weight, torch.float32) if without_triton else products
            two = by[0], by[1]
            loss, lse, gradients = blocked.run(
                products, head, index, options, split.block_classes, wanted, two, by_loss, by_lse, passes
            )
        else:
            rows = _Rows(impl, head, options, by / products.factor)
            coming = None if by_lse is None else by_lse / products.factor
            # Only the head's gradient gains by more rows than have their logits at a time.
            size = split.chunk_rows if wanted.weight else rows_without_sum(head, split)
            loss, lse, gradients = chunked.run(rows, products, head, index, size, wanted, by_loss, coming)
            loss = loss * products.factor
    if options.reduction != REDUCTIONS["none"]:
        loss = loss.sum() + nothing
    return loss, lse, gradients


def _products(head: Head, dtype: torch.dtype, factor: float) -> Products:
    if not _has_tensor_cores(head.x.device, dtype):
        return Wide(head.weight, torch.float32)
    # float16 has no room for gradients without the factor: what comes in is the scale of a loss, 65536 at first. And a
    # factor of 0 leaves the z term, which has one of its own.
    return Narrow(head.weight, dtype, 1.0 if dtype == torch.float16 else factor or 1.0)


def _has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether half precision is multiplied as it is. Off a GPU these kernels run in the interpreter."""
    return device.type == "cuda" and dtype.itemsize == 2


def _look_at(head: Head, options: Options, by: Tensor, totals: Tensor | None) -> tuple[Tensor | None, float]:
    """Return the rows that count (None: all of them) and the factor of a row's loss.

    The host waits for the device once: which rows are skipped decides the shapes of what follows.

    Raises:
        IndexError: for a label that is no class.
    """
    target, rows = head.target, len(head.target)
    mean = options.reduction == REDUCTIONS["mean"]
    if is_soft(target):
        return None, 1.0 / max(rows, 1) if mean else 1.0
    counted = target != options.ignore_index
    if totals is None:
        bad = counted & ((target < 0) | (target >= len(head.weight)))
        first = torch.where(bad.any(), bad.int().argmax() if rows else bad.sum(), rows)
        totals = torch.stack([counted.sum().double(), (1.0 / by[0]).double(), first.double()])
    count, total, first_bad = totals.tolist()
    if first_bad < rows:
        row = int(first_bad)
        raise IndexError(bad_label(row, int(target[row]), len(head.weight), options.ignore_index))
    index = None if count == rows else torch.nonzero_static(counted, size=int(count)).squeeze(-1)
    return index, (1.0 / total if total else 0.0) if mean else 1.0


for _impl in ("cuda", "triton"):
    implement(_impl, partial(_run, _impl))
