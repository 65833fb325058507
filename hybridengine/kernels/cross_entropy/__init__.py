"""Cross-entropy of labels or probabilities: one pass over the logits for the loss and its gradient."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from hybridengine.kernels import cuda_library, triton_runtime
from hybridengine.kernels.cross_entropy import cpu, gpu, reference
from hybridengine.kernels.cross_entropy.options import EMPTY, REDUCTIONS, Options, is_soft
from hybridengine.kernels.cross_entropy.quick import quick
from hybridengine.kernels.dispatch import Implementation, Operation

__all__ = ["CrossEntropyLoss", "cross_entropy"]


def _run_reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, want_lse: bool, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    return reference.run(logits, target, weight, options, want_lse)


OPERATION = Operation(
    "cross_entropy",
    Implementation("cuda", gpu.run_cuda, cuda_library.why_missing, gpu.why_not_cuda, gpu.why_slower),
    Implementation("triton", gpu.run_triton, triton_runtime.why_missing, gpu.why_not_triton, gpu.why_slower),
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not, cpu.why_slower),
    Implementation("reference", _run_reference),
)

Reduction = Literal["none", "sum", "mean"]
Empty = Literal["nan", "zero"]


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    empty: Empty = "nan",
    return_lse: Literal[False] = False,
    inplace: bool = False,
    impl: str | None = None,
) -> Tensor: ...


@overload
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    empty: Empty = "nan",
    return_lse: Literal[True],
    inplace: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    empty: Empty = "nan",
    return_lse: bool = False,
    inplace: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the cross-entropy of `logits` against labels or probabilities, in the place of torch's.

    Formula, edges and what each option does to them stand in `reference.py`. The loss is float32 (float64 for float64
    logits) also for half-precision logits; the gradient has the logits' dtype. Differentiable any number of times,
    under `torch.func` and under `torch.compile(fullgraph=True)`. Inputs are never changed unless `inplace` allows it.
    In forward mode (`jvp`, `jacfwd`, `hessian`) the automatic choice is the reference.

    Args:
        logits: [N, V], [V] or [N, V, d1, ...], any floating dtype and strides.
        target: labels, int64, of the logits' shape without V; or probabilities of the logits' shape.
        weight: [V], a factor for each class; the mean over labels divides by their summed weight.
        ignore_index: rows with this label contribute nothing, even if they hold NaN.
        label_smoothing: in [0, 1].
        reduction: "mean", "sum" or "none" (the target's shape).
        z_loss: adds `z_loss * lse^2` to each row's loss (Chowdhery et al.: PaLM, 2022), against drifting logits.
        softcap: c makes the logits c tanh(x / c) (Gemma Team: Gemma 2, 2024).
        scale: a factor of the logits, before the softcap.
        empty: what the mean over no row is. "nan" is torch's answer; the gradient is zero in either case.
        return_lse: also return each row's log-sum-exp, differentiable, 0 where ignored.
        inplace: the logits' memory may take their gradient. Later operations must not need the logits: autograd
            raises if one does. There is then one backward, of first order.
        impl: one of the names of `kernels.explain()` instead of the automatic choice.

    Returns:
        The loss, or (loss, lse).

    Raises:
        IndexError: for a label that is neither a class nor `ignore_index`; names row, label and number of classes.
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for a wrong shape or an option out of range.
    """
    if has_torch_function_unary(logits):  # logits that are not computed yet have a way of their own
        ourselves: Any = cross_entropy
        others: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            ourselves,
            (logits,),
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            z_loss=z_loss,
            softcap=softcap,
            scale=scale,
            empty=empty,
            return_lse=return_lse,
            inplace=inplace,
            impl=impl,
        )
        return others
    plain = weight is None and z_loss == 0.0 and softcap is None and scale == 1.0
    if plain and impl is None and not return_lse and empty in EMPTY:
        loss = quick(logits, target, ignore_index, label_smoothing, reduction)
        if loss is not None:
            return loss
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if empty not in EMPTY:
        raise ValueError(f"empty must be 'nan' or 'zero', not {empty!r}")
    if not 0.0 <= label_smoothing <= 1.0 or not (softcap is None or softcap > 0.0):
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1], softcap={softcap} above 0")
    options = Options(
        ignore_index, label_smoothing, scale, softcap or 0.0, z_loss, REDUCTIONS[reduction], empty == "zero"
    )
    shape = target.shape
    if logits.dim() != 2 or target.dim() != 1:
        logits, target, shape = _as_rows(logits, target)
    _check_shapes(logits, target, weight)
    chosen = OPERATION.choose(impl, logits, target, weight, options)
    result, lse = chosen.run(logits, target, weight, options, return_lse, inplace)
    if result.dim() and len(shape) != 1:
        result = result.view(shape)
    return (result, lse.view(shape)) if return_lse else result


def _check_shapes(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    rows, classes = logits.shape
    if target.shape[0] != rows or (target.dim() == 2 and (target.shape[1] != classes or not is_soft(target))):
        raise ValueError(
            f"expected logits [N, V] and target [N] or [N, V], got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    if target.dim() == 1 and target.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {target.dtype} of shape {tuple(target.shape)}")
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"expected a weight of shape ({classes},), one for each class, got {tuple(weight.shape)}")


def _as_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Bring torch's shapes into [N, V] and [N] (or [N, V]); return the shape of the rows too."""
    if logits.dim() == 0:
        raise ValueError("expected logits [N, V], [V] or [N, V, d1, ...], got a scalar")
    dim = 0 if logits.dim() == 1 else 1
    classes = logits.shape[dim]
    shape = torch.Size(size for axis, size in enumerate(logits.shape) if axis != dim)
    soft = is_soft(target) and target.shape == logits.shape
    if not soft and target.shape != shape:
        raise ValueError(
            f"expected logits [N, V] and target [N] or [N, V] (or with more dimensions after V), got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}"
        )
    rows = logits.movedim(dim, -1).reshape(-1, classes)
    return rows, target.movedim(dim, -1).reshape(-1, classes) if soft else target.reshape(-1), shape


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy` as a module, in the place of `torch.nn.CrossEntropyLoss`; the arguments are the function's."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        softcap: float | None = None,
        scale: float = 1.0,
        empty: Empty = "nan",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self.z_loss = z_loss
        self.softcap = softcap
        self.scale = scale
        self.empty: Empty = empty

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `logits` against `target`, of any shapes that `cross_entropy` takes."""
        return cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            z_loss=self.z_loss,
            softcap=self.softcap,
            scale=self.scale,
            empty=self.empty,
        )
