"""The operators and their derivatives of every order, whatever implementation runs them.

`cross_entropy` returns loss, log-sum-exps and, if wanted, the *unit gradient*: d loss / d logits for an incoming
gradient of 1 (for "none" each row's own). First-order training multiplies that by the incoming gradient, in place, and
gives it away. A gradient that comes in for the log-sum-exps, and a second backward, run `cross_entropy_backward`. All
else (create_graph, torch.func) goes through `_Gradient`, whose derivatives are plain torch: they have derivatives too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.cross_entropy.derivatives import Problem, gradient, second_derivative
from hybridengine.kernels.cross_entropy.options import REDUCTIONS, SCHEMA, Options
from hybridengine.kernels.modes import forward_mode, is_transformed
from hybridengine.kernels.scaling import scale_rows

__all__ = ["run_operator"]

_OPTIONS = len(Options._fields)


def _fake(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction, want_gradient = Options(*options[:_OPTIONS]).reduction, options[_OPTIONS]
    lse = logits.new_empty((logits.shape[0],), dtype=native.accumulator_dtype(logits.dtype))
    loss = torch.empty_like(lse) if reduction == REDUCTIONS["none"] else lse.new_empty(())
    return loss, lse, logits.new_empty(logits.shape if want_gradient else (0,))


operators.define(
    f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, {SCHEMA}, bool want_gradient, str impl)"
    " -> (Tensor loss, Tensor lse, Tensor gradient)",
    _fake,
)
operators.define(
    f"cross_entropy_backward(Tensor? by_loss, Tensor? by_lse, Tensor logits, Tensor target, Tensor? weight, {SCHEMA},"
    " str impl) -> Tensor",
    lambda by_loss, by_lse, logits, *rest: logits.new_empty(logits.shape),
)
operators.define(  # the gradient is written over the logits
    f"cross_entropy_(Tensor(a!) logits, Tensor target, Tensor? weight, {SCHEMA}, str impl)"
    " -> (Tensor loss, Tensor lse)",
    lambda *arguments: _fake(*arguments, False)[:2],
)


def _times_rows(matrix: Tensor, factor: Tensor) -> Tensor:
    """Multiply [N, V] by a scalar or by [N], keeping the matrix's dtype."""
    return (matrix * (factor.unsqueeze(-1) if factor.dim() else factor)).to(matrix.dtype)


class _Gradient(torch.autograd.Function):
    """The gradient of the logits as a function that can itself be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        by_loss: Tensor | None,
        by_lse: Tensor | None,
        logits: Tensor,
        unit: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        *options: Any,
    ) -> Tensor:
        if unit is not None and by_loss is not None and by_lse is None:
            return _times_rows(unit, by_loss)
        problem = Problem.of(logits, target, weight, Options(*options))
        return gradient(by_loss, by_lse, problem).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        by_loss, by_lse, logits, _, target, weight, *options = inputs
        ctx.options = Options(*options)
        ctx.save_for_backward(by_loss, by_lse, logits, target, weight)

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        by_loss, by_lse, logits, target, weight = ctx.saved_tensors
        # From the logits, not from the saved unit gradient: this must depend on them for the next derivative.
        problem = Problem.of(logits, target, weight, ctx.options)
        to_loss, to_lse, to_logits = second_derivative(direction, by_loss, by_lse, problem)
        to_loss = None if to_loss is None else to_loss.to(by_loss.dtype)
        to_lse = None if to_lse is None else to_lse.to(by_lse.dtype)
        return to_loss, to_lse, to_logits.to(logits.dtype), *[None] * (3 + _OPTIONS)


class _CrossEntropy(torch.autograd.Function):
    """The loss in ordinary eager mode and under torch.compile.

    Apart from `_Transformable` because a `setup_context` costs an `inspect.signature` a call.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, want_gradient: bool, impl: str, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        operator = torch.ops.hybridengine.cross_entropy
        loss, lse, unit = operator(logits, target, weight, *options, want_gradient, impl)
        _remember(ctx, logits, target, weight, unit, impl, options)
        return loss, lse, unit

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, by_loss, by_lse), *[None] * (4 + _OPTIONS)


class _InPlace(torch.autograd.Function):
    """The loss whose gradient takes the place of the logits: one backward of first order, and none by the lse."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, impl: str, *options: Any
    ) -> tuple[Tensor, Tensor]:
        loss, lse = torch.ops.hybridengine.cross_entropy_(logits.detach(), target, weight, *options, impl)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits for a backward must hear of it
        ctx.unit, ctx.options = logits.detach(), Options(*options)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return loss, lse

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        rest = [None] * (3 + _OPTIONS)
        if by_loss is None:
            return None, *rest
        if ctx.unit is None or torch.is_grad_enabled() or is_transformed(by_loss):
            raise RuntimeError(
                "cross_entropy(..., inplace=True) has overwritten its logits: it has one backward, of first order."
                " Leave inplace out to differentiate again."
            )
        unit, ctx.unit = ctx.unit, None
        scale_rows(unit, by_loss)
        return unit, *rest


def _remember(
    ctx: Any,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    unit: Tensor,
    impl: str,
    options: tuple[Any, ...],
) -> None:
    ctx.options, ctx.impl = Options(*options), impl
    ctx.given_away = False
    ctx.mark_non_differentiable(unit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, weight, unit)


def _backward(ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None) -> Tensor | None:
    if by_loss is None and by_lse is None:
        return None
    logits, target, weight, unit = ctx.saved_tensors
    problem = (logits, target, weight)
    ready = by_lse is None and unit.numel() == logits.numel()
    if torch.compiler.is_compiling():
        if ready and by_loss is not None:
            return _times_rows(unit, by_loss)
    elif forward_mode():
        return gradient(by_loss, by_lse, Problem.of(*problem, ctx.options)).to(logits.dtype)
    else:
        ready = ready and not ctx.given_away
        if torch.is_grad_enabled() or any(one is not None and is_transformed(one) for one in (by_loss, by_lse, logits)):
            known = unit if ready else None
            differentiable: Tensor = operators.apply(
                _Gradient, by_loss, by_lse, logits, known, target, weight, *ctx.options
            )
            return differentiable
        if ready and by_loss is not None:
            # The caller may keep the buffer as .grad and add to it: a second backward computes a new one.
            ctx.given_away = True
            scale_rows(unit, by_loss)
            given: Tensor = unit
            return given
    again = torch.ops.hybridengine.cross_entropy_backward
    result: Tensor = again(by_loss, by_lse, *problem, *ctx.options, ctx.impl)
    return result


class _Transformable(torch.autograd.Function):
    """The loss under torch.func."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, want_gradient: bool, impl: str, *options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        operator = torch.ops.hybridengine.cross_entropy
        loss, lse, unit = operator(logits, target, weight, *options, want_gradient, impl)
        return loss, lse, unit

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, target, weight, _, impl, *options = inputs
        _remember(ctx, logits, target, weight, output[2], impl, tuple(options))

    backward = _CrossEntropy.backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Run the problems of a batch one after the other: a problem is a matrix of logits, large enough for that."""
        dims = in_dims[:3]
        problems = [
            [_at(one, dim, index) for one, dim in zip(arguments[:3], dims, strict=True)]
            for index in range(info.batch_size)
        ]
        done = [operators.apply(_Transformable, *problem, *arguments[3:]) for problem in problems]
        return tuple(torch.stack(each) for each in zip(*done, strict=True)), (0, 0, 0)


def _at(tensor: Tensor | None, dim: int | None, index: int) -> Tensor | None:
    return tensor if tensor is None or dim is None else tensor.select(dim, index)


def _may_overwrite(logits: Tensor) -> bool:
    base = logits._base
    return logits.is_contiguous() and not logits.is_leaf and (base is None or not base.is_leaf)


def run_operator(
    impl: str,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    want_lse: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Return loss and log-sum-exps [N] through the operators."""
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()
    # A batched tensor hides whether a gradient of it is wanted: assume so.
    wanted = torch.is_grad_enabled() and (transformed or logits.requires_grad)
    if inplace and wanted and not want_lse and not transformed and not compiling and _may_overwrite(logits):
        result: tuple[Tensor, Tensor] = operators.apply(_InPlace, logits, target, weight, impl, *options)
        return result
    function = _Transformable if transformed else _CrossEntropy
    # Where a gradient may come in for the lse, the whole gradient is left to one pass of the backward; in float16 too,
    # where the loss scale that comes in keeps small probabilities above the smallest number.
    early = wanted and not want_lse and logits.dtype != torch.float16
    loss, lse, _ = operators.apply(function, logits, target, weight, early, impl, *options)
    return loss, lse
