"""The head of a language model and its cross-entropy in one: the logits of all rows never exist."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from hybridengine.kernels import cuda_library, triton_runtime
from hybridengine.kernels.cross_entropy import cross_entropy
from hybridengine.kernels.cross_entropy.options import EMPTY, REDUCTIONS, Options, is_soft
from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.linear_cross_entropy import cpu, gpu, reference
from hybridengine.kernels.linear_cross_entropy.blocked import classes_per_block
from hybridengine.kernels.linear_cross_entropy.chunks import rows_per_chunk
from hybridengine.kernels.linear_cross_entropy.rows import Head, Split

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]


def _run_reference(head: Head, options: Options, want_lse: bool, split: Split) -> tuple[Tensor, Tensor | None]:
    return reference.run(*head, options, want_lse)


OPERATION = Operation(
    "linear_cross_entropy",
    Implementation("cuda", gpu.run_cuda, cuda_library.why_missing, gpu.why_not_cuda, gpu.why_slower_cuda),
    Implementation("triton", gpu.run_triton, triton_runtime.why_missing, gpu.why_not_triton, gpu.why_slower),
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not, cpu.why_slower),
    Implementation("reference", _run_reference),
)

Reduction = Literal["none", "sum", "mean"]
Empty = Literal["nan", "zero"]
Mode = Literal["auto", "low_memory"]


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    empty: Empty = "nan",
    return_lse: Literal[False] = False,
    mode: Mode = "auto",
    chunk_rows: int | None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    empty: Empty = "nan",
    return_lse: Literal[True],
    mode: Mode = "auto",
    chunk_rows: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    empty: Empty = "nan",
    return_lse: bool = False,
    mode: Mode = "auto",
    chunk_rows: int | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `cross_entropy(x @ weight.T + bias, target)` from a few rows of logits at a time.

    Options, edges and loss dtype are those of `cross_entropy`. Rows to be ignored cost nothing; a frozen head costs no
    gradient of the head, a frozen `x` none of `x`. Half precision is multiplied and summed in float32, also under
    autocast, and every gradient rounded once. On a GPU tensor cores multiply, which round the logits' gradient too, and
    on a CPU with AMX its tiles; for both, autocast rounds wide tensors first, as it does for torch's own products.
    Differentiable any number of times, the second one also in chunks; under `torch.func` and in forward mode the
    automatic choice is the reference, which holds all logits.

    Args:
        x: [..., H], hidden states.
        weight: [V, H], the head. As in torch it may be [V, d1, ..., H] for x [N, H], a target [N, d1, ...] and a bias
            [V, d1, ...]; then all logits are made.
        target: labels [...], int64, or probabilities [..., V].
        bias: [V].
        class_weight: [V], a factor for each class.
        ignore_index, label_smoothing, reduction, z_loss, softcap, scale, empty, return_lse: as in `cross_entropy`.
        mode: "auto" computes some rows of logits at a time and holds the head's gradient in float32 while it grows.
            "low_memory" computes some classes at a time, twice: a third more arithmetic, and little memory beyond the
            gradients themselves. For half-precision heads and large vocabularies.
        chunk_rows: rows of logits (on a GPU, in half precision: of their gradient) at a time instead of the automatic
            number (`chunks.py`); where no gradient of the head is made, at most.
        impl: one of the names of `kernels.explain()` instead of the automatic choice.

    Returns:
        The loss, or (loss, lse); "none" and lse have the shape [...].

    Raises:
        IndexError: for a label that is neither a class nor `ignore_index`; names row, label and number of classes.
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for a wrong shape or an option out of range.
    """
    if reduction not in REDUCTIONS or empty not in EMPTY:
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none', empty={empty!r} 'nan' or 'zero'")
    if not 0.0 <= label_smoothing <= 1.0 or not (softcap is None or softcap > 0.0):
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1], softcap={softcap} above 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if mode not in ("auto", "low_memory"):
        raise ValueError(f"mode must be 'auto' or 'low_memory', not {mode!r}")
    if weight.dim() > 2:
        logits = (x @ weight.flatten(0, -2).t()).view(*x.shape[:-1], *weight.shape[:-1])
        return cross_entropy(  # type: ignore[call-overload, no-any-return]
            logits if bias is None else logits + bias,
            target,
            weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            z_loss=z_loss,
            softcap=softcap,
            scale=scale,
            empty=empty,
            return_lse=return_lse,
        )
    head = _as_rows(x, weight, bias, target, class_weight)
    options = Options(
        ignore_index, label_smoothing, scale, softcap or 0.0, z_loss, REDUCTIONS[reduction], empty == "zero"
    )
    chosen = OPERATION.choose(impl, head, options)
    dtype = (cpu if chosen.name == "cpu" else gpu).product_dtype(head)
    split = Split(
        chunk_rows or rows_per_chunk(head, dtype),
        classes_per_block(len(head.x), len(weight)) if mode == "low_memory" else 0,
        dtype,
    )
    loss, lse = chosen.run(head, options, return_lse, split)
    shape = x.shape[:-1]
    loss = loss.view(shape) if loss.dim() else loss
    return (loss, lse.view(shape)) if return_lse else loss


def _as_rows(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None) -> Head:
    soft = is_soft(target)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected x [..., H] and weight [V, H], got {tuple(x.shape)} and {tuple(weight.shape)}")
    classes = len(weight)
    expected = (*x.shape[:-1], classes) if soft else x.shape[:-1]
    if target.shape != expected or not (soft or target.dtype == torch.int64):
        raise ValueError(
            f"expected a target of shape {tuple(x.shape[:-1])} (int64) or {(*x.shape[:-1], classes)} (floating) for x "
            f"{tuple(x.shape)}, got {tuple(target.shape)} {target.dtype}"
        )
    for name, one in (("bias", bias), ("class_weight", class_weight)):
        if one is not None and one.shape != (classes,):
            raise ValueError(f"expected {name} [{classes}], one for each class, got {tuple(one.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    return Head(rows, weight, bias, target.reshape(len(rows), classes) if soft else target.reshape(-1), class_weight)


class LinearCrossEntropyLoss(torch.nn.Module):
    """A head of its own with `linear_cross_entropy` as its loss: `forward(x, target)`.

    Args:
        in_features: H.
        num_classes: V.
        bias: whether the head has one.
        class_weight: [V].
        device, dtype: of the parameters.
        ignore_index, label_smoothing, reduction, z_loss, softcap, scale, empty: as in the function.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        class_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        softcap: float | None = None,
        scale: float = 1.0,
        empty: Empty = "nan",
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self.z_loss = z_loss
        self.softcap = softcap
        self.scale = scale
        self.empty: Empty = empty

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of `x` [..., H] against `target`."""
        return linear_cross_entropy(
            x,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            z_loss=self.z_loss,
            softcap=self.softcap,
            scale=self.scale,
            empty=self.empty,
        )
