"""The operator's schema and its derivatives of every order, whatever implementation the operator has on a device.

The operator returns the loss together with its *unit gradient*: d loss / d logits for an incoming gradient of 1 (for
"none" each row's own). First-order training multiplies that by the incoming gradient, in place, and gives it away. All
else (create_graph, torch.func) goes through `_Gradient`, whose derivatives are plain torch: they have derivatives too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.cross_entropy.derivatives import Options, denominator, hessian_times, unit_gradient
from hybridengine.kernels.modes import forward_mode

__all__ = ["REDUCTIONS", "run_operator"]

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}  # the numbers of `Reduction` in csrc/cross_entropy/cross_entropy.h


def _fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore: int, smoothing: float, reduction: int, *rest: bool
) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    loss = logits.new_empty(
        (rows,) if reduction == REDUCTIONS["none"] else (), dtype=native.accumulator_dtype(logits.dtype)
    )
    return loss, logits.new_empty((rows, classes) if rest[-1] else (0,))


operators.define(
    "cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "int reduction, bool empty_is_zero, bool want_gradient, str impl) -> (Tensor loss, Tensor gradient)",
    _fake,
)


def _times_rows(matrix: Tensor, factor: Tensor) -> Tensor:
    """Multiply [N, V] by a scalar or by [N], keeping the matrix's dtype."""
    return (matrix * (factor.unsqueeze(-1) if factor.dim() else factor)).to(matrix.dtype)


class _Gradient(torch.autograd.Function):
    """d loss / d logits times the incoming gradient, as a function that can itself be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss: Tensor, logits: Tensor, unit: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> Tensor:
        return _times_rows(unit, grad_loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_loss, logits, _, target, weight, *options = inputs
        ctx.options = Options(*options)
        ctx.save_for_backward(grad_loss, logits, target, weight)

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        grad_loss, logits, target, weight = ctx.saved_tensors
        # From the logits, not from the saved unit gradient: this must depend on them for the next derivative.
        aligned = (unit_gradient(logits, target, weight, ctx.options) * direction).sum(-1)
        by_loss = aligned if grad_loss.dim() else aligned.sum()
        by_logits = _times_rows(hessian_times(direction, logits, target, weight, ctx.options), grad_loss)
        return by_loss.to(grad_loss.dtype), by_logits.to(logits.dtype), *[None] * 7


class _CrossEntropy(torch.autograd.Function):
    """The loss in ordinary eager mode and under torch.compile.

    Apart from `_Transformable` because a `setup_context` costs an `inspect.signature` a call.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, want_gradient: bool, *options: Any
    ) -> tuple[Tensor, Tensor]:
        loss, unit = torch.ops.hybridengine.cross_entropy(logits, target, weight, *options, want_gradient, "cpu")
        _remember(ctx, logits, target, weight, unit, options)
        return loss, unit

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = None if grad_loss is None else _backward(ctx, grad_loss)
        return gradient, *[None] * 7


def _remember(
    ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, unit: Tensor, options: tuple[Any, ...]
) -> None:
    ctx.options = Options(*options)
    ctx.given_away = False
    ctx.mark_non_differentiable(unit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, unit)


def _backward(ctx: Any, grad_loss: Tensor) -> Tensor:
    unit: Tensor
    logits, target, weight, unit = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return _times_rows(unit, grad_loss)
    if forward_mode():
        return _times_rows(unit_gradient(logits, target, weight, ctx.options), grad_loss).to(logits.dtype)
    ready = unit.numel() == logits.numel() and not ctx.given_away
    if torch.is_grad_enabled() or _is_transformed(grad_loss) or _is_transformed(logits):
        unit = unit if ready else unit_gradient(logits, target, weight, ctx.options).to(logits.dtype)
        differentiable: Tensor = operators.apply(
            _Gradient, grad_loss, logits, unit.detach(), target, weight, *ctx.options
        )
        return differentiable
    if not ready:
        unit = torch.ops.hybridengine.cross_entropy(logits, target, weight, *ctx.options, True, "cpu")[1]
    # The caller may keep the buffer as .grad and add to it: a second backward computes a new one.
    ctx.given_away = True
    _scale_in_place(unit, grad_loss)
    return unit


class _Transformable(torch.autograd.Function):
    """The loss under torch.func."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, want_gradient: bool, *options: Any
    ) -> tuple[Tensor, Tensor]:
        loss, unit = torch.ops.hybridengine.cross_entropy(logits, target, weight, *options, want_gradient, "cpu")
        return loss, unit

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, weight, _, *options = inputs
        _remember(ctx, logits, target, weight, output[1], tuple(options))

    backward = _CrossEntropy.backward

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        want: bool,
        *flat_options: Any,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Run a batch of B problems as one of B*N rows, then reduce each problem for itself."""
        options = Options(*flat_options)
        logits = _batch_first(logits, in_dims[0], info.batch_size)
        target = _batch_first(target, in_dims[1], info.batch_size)
        if weight is not None and in_dims[2] is not None:
            return _one_by_one(logits, target, weight.movedim(in_dims[2], 0), options, want)
        rows = options._replace(reduction=REDUCTIONS["none"])
        loss, unit = operators.apply(_Transformable, logits.flatten(0, 1), target.flatten(), weight, want, *rows)
        unit = unit.view(logits.shape) if want else unit.expand(info.batch_size, 0)
        return _reduce_each(loss.view(target.shape), unit, target, weight, options), (0, 0)


def _reduce_each(
    loss: Tensor, unit: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Reduce the row losses [B, N] of each problem and scale their gradients [B, N, V] (or [B, 0]) alike."""
    if options.reduction == REDUCTIONS["none"]:
        return loss, unit
    loss = loss.sum(1)
    if options.reduction == REDUCTIONS["sum"]:
        return loss, unit
    total = denominator(target, weight, options, loss.dtype)
    scale = torch.where(total == 0, 0.0, 1.0 / total)
    loss = torch.where(total == 0, 0.0 if options.empty_is_zero else float("nan"), loss * scale)
    return loss, (unit * scale[:, None, None]).to(unit.dtype) if unit.dim() == 3 else unit


def _batch_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _one_by_one(
    logits: Tensor, target: Tensor, weight: Tensor, options: Options, want: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Run a batch of problems that differ in their class weights."""
    done = [operators.apply(_Transformable, *one, want, *options) for one in zip(logits, target, weight, strict=True)]
    return (torch.stack([loss for loss, _ in done]), torch.stack([unit for _, unit in done])), (0, 0)


def _is_transformed(tensor: Tensor) -> bool:
    """Whether `tensor` only stands for another one, inside torch.func or a batched backward (`is_grads_batched`)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not torch._C._has_storage(tensor)


def _scale_in_place(unit: Tensor, factor: Tensor) -> None:
    """Multiply the rows of `unit` by `factor` (a scalar or [N]); free where every factor is 1."""
    factor = factor.to(native.accumulator_dtype(unit.dtype))
    rows, classes = unit.shape
    native.module().scale_rows(
        native.ELEMENT_TYPES[unit.dtype],
        unit.data_ptr(),
        rows,
        classes,
        factor.data_ptr(),
        factor.stride(0) if factor.dim() else 0,
    )


def run_operator(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Return the loss through the operator of the logits' device."""
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    # A batched tensor hides whether a gradient of it is wanted: assume so.
    want_gradient = torch.is_grad_enabled() and (transformed or logits.requires_grad)
    function = _Transformable if transformed else _CrossEntropy
    loss: Tensor = operators.apply(function, logits, target, weight, want_gradient, *options)[0]
    return loss
