"""The operators and their derivatives of every order, whatever runs the rows.

As in `cross_entropy`, the forward pass also computes the gradients for an incoming gradient of 1, and the first
backward scales them in place and gives them away. Where rows get gradients of their own ("none", or one that comes in
for the lse) everything is computed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.cross_entropy.options import REDUCTIONS, SCHEMA, Options
from hybridengine.kernels.linear_cross_entropy.chunks import rows_without_sum
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, Split, Wanted
from hybridengine.kernels.linear_cross_entropy.second_order import differentiable_gradients
from hybridengine.kernels.modes import is_transformed
from hybridengine.kernels.scaling import scale_rows

__all__ = ["implement", "run_operator"]

_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
_OPTIONS = len(Options._fields)
_HEAD = len(Head._fields)


def _like(tensor: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else tensor.new_empty(0)


def _fake_gradients(head: Head, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    bias = head.weight if head.bias is None else head.bias
    return _like(head.x, wanted.x), _like(head.weight, wanted.weight), _like(bias, wanted.bias)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    head, options = Head(*arguments[:_HEAD]), Options(*arguments[_HEAD : _HEAD + _OPTIONS])
    lse = head.x.new_empty((len(head.x),), dtype=native.accumulator_dtype(head.x.dtype))
    loss = torch.empty_like(lse) if options.reduction == REDUCTIONS["none"] else lse.new_empty(())
    return loss, lse, *_fake_gradients(head, Wanted(*arguments[-1]))


def _fake_backward(by_loss: Tensor | None, by_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(Head(*arguments[:_HEAD]), Wanted(*arguments[-1]))


operators.define(
    f"linear_cross_entropy({_TENSORS}, {SCHEMA}, int chunk_rows, int block_classes, ScalarType dtype,"
    " bool[] wanted, str impl)"
    " -> (Tensor loss, Tensor lse, Tensor by_x, Tensor by_weight, Tensor by_bias)",
    _fake,
)
operators.define(
    f"linear_cross_entropy_backward(Tensor? by_loss, Tensor? by_lse, {_TENSORS}, {SCHEMA}, int chunk_rows,"
    " int block_classes, ScalarType dtype, bool[] wanted, str impl) -> (Tensor by_x, Tensor by_weight, Tensor by_bias)",
    _fake_backward,
)


def implement(impl: str, run: Callable[..., tuple[Tensor, Tensor, Gradients]]) -> None:
    """Register an implementation: `run(head, options, split, wanted, by_loss, by_lse)` -> loss, lse, gradients."""

    def call(arguments: tuple[Any, ...], *coming: Tensor | None) -> tuple[Tensor, ...]:
        options = Options(*arguments[_HEAD : _HEAD + _OPTIONS])
        *split, wanted = arguments[_HEAD + _OPTIONS :]
        head = Head(*arguments[:_HEAD])
        loss, lse, gradients = run(head, options, Split(*split), Wanted(*wanted), *coming)
        return loss, lse, *(head.x.new_empty(0) if one is None else one for one in gradients)

    def backward(by_loss: Tensor | None, by_lse: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        if by_loss is None:
            by_loss = torch.zeros((), device=arguments[0].device)
        return call(arguments, by_loss, by_lse)[2:]

    operators.implement("linear_cross_entropy", impl, lambda *arguments: call(arguments))
    operators.implement("linear_cross_entropy_backward", impl, backward)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, early: bool, split: Split, wanted: Wanted, impl: str, *arguments: Any) -> Any:
        """`early`: whether the gradients are computed now."""
        head, options = Head(*arguments[:_HEAD]), Options(*arguments[_HEAD:])
        now = wanted if early else Wanted(False, False, False)
        operator = torch.ops.hybridengine.linear_cross_entropy
        loss, lse, *gradients = operator(*head, *options, *split, list(now), impl)
        ctx.options, ctx.split, ctx.wanted, ctx.impl = options, split, wanted, impl
        ctx.ready = early
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*head, *gradients)
        return loss, lse, *gradients

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients = Gradients(None, None, None)
        if by_loss is not None or by_lse is not None:
            gradients = _backward(ctx, by_loss, by_lse)
        return None, None, None, None, *gradients, *[None] * (2 + _OPTIONS)


def _backward(ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None) -> Gradients:
    saved = ctx.saved_tensors
    head, unit = Head(*saved[:_HEAD]), saved[_HEAD:]
    ready = ctx.ready and by_loss is not None and by_lse is None
    if torch.compiler.is_compiling():
        if ready:
            return _masked([(one * by_loss).to(one.dtype) for one in unit], ctx.wanted)
    elif torch.is_grad_enabled() or any(one is not None and is_transformed(one) for one in (by_loss, by_lse)):
        known = unit if ready else None
        rows = rows_without_sum(head, ctx.split)
        return differentiable_gradients(by_loss, by_lse, head, ctx.options, rows, ctx.wanted, known)
    elif ready and by_loss is not None:
        ctx.ready = False  # the caller may keep the buffers and add to them: a second backward computes new ones
        for one in unit:
            scale_rows(one if one.dim() == 2 else one.view(1, -1), by_loss)
        return _masked(unit, ctx.wanted)
    again = torch.ops.hybridengine.linear_cross_entropy_backward
    return _masked(again(by_loss, by_lse, *head, *ctx.options, *ctx.split, list(ctx.wanted), ctx.impl), ctx.wanted)


def _masked(gradients: Any, wanted: Wanted) -> Gradients:
    return Gradients(*(one if want else None for one, want in zip(gradients, wanted, strict=True)))


def _is_float16(head: Head) -> bool:
    device = head.x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return True
    return any(one is not None and one.dtype == torch.float16 for one in head[:3])


def run_operator(impl: str, head: Head, options: Options, want_lse: bool, split: Split) -> tuple[Tensor, Tensor]:
    """Return loss and log-sum-exps [N] through the operators."""
    recorded = torch.is_grad_enabled()
    wanted = Wanted(*(recorded and one is not None and one.requires_grad for one in head[:3]))
    early = any(wanted) and not want_lse and options.reduction != REDUCTIONS["none"]
    early = early and not _is_float16(head)  # the loss scale that comes in keeps small gradients from vanishing
    result = operators.apply(_LinearCrossEntropy, early, split, wanted, impl, *head, *options)
    return result[0], result[1]
