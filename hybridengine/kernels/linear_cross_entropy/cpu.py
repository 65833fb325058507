"""Linear cross-entropy on the CPU: matrix products around the native row kernel of `cross_entropy`.

The products are torch's, of float32 numbers, or those of the native library where the CPU multiplies bfloat16 in tiles.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.cross_entropy.cpu import Factors, check_labels, launch, reduced
from hybridengine.kernels.cross_entropy.options import Options, is_soft
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.linear_cross_entropy import blocked, chunked
from hybridengine.kernels.linear_cross_entropy.amx import Tiles
from hybridengine.kernels.linear_cross_entropy.autograd import implement, run_operator
from hybridengine.kernels.linear_cross_entropy.chunks import rows_without_sum
from hybridengine.kernels.linear_cross_entropy.products import Products, Wide
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, Split, Wanted, counted_rows
from hybridengine.kernels.modes import why_not_transformed

__all__ = ["product_dtype", "run", "why_missing", "why_not", "why_slower"]

why_missing = native.why_missing
run = partial(run_operator, "cpu")

# Below, the logits of all rows are small and one product of matrices is faster than any loop.
_FEWEST_LOGITS = 1 << 20


def why_slower(head: Head, options: Options) -> str | None:
    """Say why plain torch is faster for this shape."""
    if len(head.x) * len(head.weight) < _FEWEST_LOGITS:
        return f"fewer than {_FEWEST_LOGITS} logits: plain torch is faster"
    return None


def why_not(head: Head, options: Options) -> str | None:
    """Say why these arguments cannot run here."""
    given = [one for one in head if one is not None]
    for tensor in given:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device.type}, not on the CPU"
    if any(one is not None and one.requires_grad for one in head[3:]):
        return "a gradient of the targets or of the class weights is wanted"
    if len(head.weight) == 0:
        return "there are no classes"
    return why_not_transformed(*given)


def product_dtype(head: Head) -> torch.dtype:
    """Return in what a CPU multiplies: bfloat16 where plain torch would and there are tiles, otherwise wide."""
    dtype = torch.promote_types(head.x.dtype, head.weight.dtype)
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    return dtype if dtype == torch.bfloat16 and native.has_tiles() else native.accumulator_dtype(head.x.dtype)


class _Rows:
    """The native row kernel as a `RowKernel`."""

    def __init__(self, class_weight: Tensor | None, options: Options, factors: Factors) -> None:
        self.class_weight, self.options, self.factors = class_weight, options, factors

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
        launch(
            logits,
            target.to(logits.dtype) if is_soft(target) else target,
            self.class_weight,
            self.options,
            self.factors,
            loss=loss,
            lse=lse,
            gradient=gradient,
            by_loss=by_loss,
            by_lse=by_lse,
        )


def _run(
    head: Head,
    options: Options,
    split: Split,
    wanted: Wanted,
    by_loss: Tensor | None = None,
    by_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    record("linear_cross_entropy", "cpu")
    dtype = native.accumulator_dtype(head.x.dtype)
    class_weight = None if head.class_weight is None else head.class_weight.to(dtype).contiguous()
    target = head.target.contiguous()
    factors = check_labels(target, class_weight, len(head.weight), options, native.ELEMENT_TYPES[dtype])
    index = counted_rows(target, options.ignore_index)
    by_loss, by_lse = (None if one is None else one.to(dtype) for one in (by_loss, by_lse))
    with torch.autocast("cpu", enabled=False):  # its casts would round what is to be exact
        in_tiles = split.dtype == torch.bfloat16 and native.has_tiles()
        products: Products = Tiles(head.weight) if in_tiles else Wide(head.weight, dtype)
        if split.block_classes:
            loss, lse, gradients = blocked.run(
                products, head, index, options, split.block_classes, wanted, factors[:2], by_loss, by_lse
            )
        else:
            rows = _Rows(class_weight, options, factors)
            size = split.chunk_rows if wanted.weight else rows_without_sum(head, split)
            loss, lse, gradients = chunked.run(rows, products, head, index, size, wanted, by_loss, by_lse)
    return reduced(loss, options, factors), lse, gradients


implement("cpu", _run)
