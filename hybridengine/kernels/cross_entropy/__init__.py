"""Cross-entropy of integer labels: one pass over the logits for the loss and its gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hybridengine.kernels.cross_entropy import cpu, reference
from hybridengine.kernels.cross_entropy.autograd import REDUCTIONS
from hybridengine.kernels.dispatch import Implementation, Operation

__all__ = ["CrossEntropyLoss", "cross_entropy"]

OPERATION = Operation(
    "cross_entropy",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not, cpu.why_slower),
    Implementation("reference", reference.run),
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "sum", "mean"] = "mean",
    empty: Literal["nan", "zero"] = "nan",
    impl: str | None = None,
) -> Tensor:
    """Return the cross-entropy of `logits` against class indices.

    The formula is that of `torch.nn.functional.cross_entropy` and stands in `reference.py`. The loss is float32
    (float64 for float64 logits) also for half-precision logits; the gradient has the logits' dtype. Differentiable any
    number of times, under `torch.func` and under `torch.compile(fullgraph=True)`. Inputs are never changed. In forward
    mode (`jvp`, `jacfwd`, `hessian`) the automatic choice is the reference.

    Args:
        logits: [N, V], any floating dtype and strides.
        target: [N] int64.
        weight: [V], a factor for each class; the mean divides by the summed weight of the labels.
        ignore_index: rows with this label contribute nothing.
        label_smoothing: in [0, 1].
        reduction: "mean", "sum" or "none".
        empty: what the mean over no row is. "nan" is torch's answer; the gradient is zero in either case.
        impl: "cpu" or "reference" instead of the automatic choice.

    An ignored row contributes nothing to the native kernels' gradient even if it holds NaN; torch's own backward (the
    reference) makes that row's gradient NaN.

    Raises:
        IndexError: for a label that is neither a class nor `ignore_index`; names row, label and number of classes.
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for a wrong shape, `reduction` or `empty`.
    """
    shape = logits.shape
    if len(shape) != 2 or target.dim() != 1 or len(target) != shape[0]:
        raise ValueError(f"expected logits [N, V] and target [N], got {tuple(shape)} and {tuple(target.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if empty != "nan" and empty != "zero":
        raise ValueError(f"empty must be 'nan' or 'zero', not {empty!r}")
    chosen = OPERATION.choose(impl, logits, target, weight, label_smoothing)
    loss: Tensor = chosen.run(logits, target, weight, ignore_index, label_smoothing, reduction, empty)
    return loss


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy` as a module, in the place of `torch.nn.CrossEntropyLoss` for logits [N, V] and labels [N]."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Literal["none", "sum", "mean"] = "mean",
        empty: Literal["nan", "zero"] = "nan",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction: Literal["none", "sum", "mean"] = reduction
        self.empty: Literal["nan", "zero"] = empty

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `logits` [N, V] against `target` [N]."""
        return cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            empty=self.empty,
        )
