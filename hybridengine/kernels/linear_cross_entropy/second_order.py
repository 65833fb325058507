"""The gradients of x, weight and bias as functions that can themselves be differentiated, chunk by chunk.

With G the gradient of the logits, directions v_x, v_W, v_b for the three gradients, and the same chunk of rows in all:

    <v_x, G W> + <v_W, G^T x> + <v_b, sum of G> = <G, U>     with  U = v_x W^T + x v_W^T + v_b

so that with S the derivative of <G, U> by the logits (`cross_entropy/derivatives.py`), the gradients of that sum are

    by x: S W + G v_W      by W: S^T x + G^T v_x      by b: sum of S

Memory is that of a few chunks of logits, unless a third derivative is wanted: then autograd keeps all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import operators
from hybridengine.kernels.cross_entropy.derivatives import Problem, gradient, second_derivative
from hybridengine.kernels.cross_entropy.options import Options, factors, is_soft, without_ignored
from hybridengine.kernels.linear_cross_entropy.rows import Gradients, Head, Wanted
from hybridengine.kernels.native import accumulator_dtype

__all__ = ["differentiable_gradients"]


def differentiable_gradients(
    by_loss: Tensor | None,
    by_lse: Tensor | None,
    head: Head,
    options: Options,
    chunk_rows: int,
    wanted: Wanted,
    known: tuple[Tensor, ...] | None,
) -> Gradients:
    """Return the gradients with a graph; `known` are those for an incoming gradient of 1, if they are known."""
    unit = (None, None, None) if known is None else known
    result = operators.apply(_Gradients, by_loss, by_lse, chunk_rows, wanted, *unit, *head, *options)
    return Gradients(*(one if want else None for one, want in zip(result, wanted, strict=True)))


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, by_loss: Tensor | None, by_lse: Tensor | None, chunk_rows: int, wanted: Wanted, *rest: Any
    ) -> Any:
        unit, head, options = rest[:3], Head(*rest[3:8]), Options(*rest[8:])
        ctx.options, ctx.chunk_rows, ctx.wanted = options, chunk_rows, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(by_loss, by_lse, *head)
        if unit[0] is not None:
            return tuple((one * by_loss).to(one.dtype) for one in unit)
        with torch.autocast(head.x.device.type, enabled=False):
            return _first(by_loss, by_lse, head, options, chunk_rows)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        by_loss, by_lse, *tensors = ctx.saved_tensors
        if all(one is None for one in directions):
            return (None,) * (7 + len(tensors) + len(ctx.options))
        second = _Second(by_loss, by_lse, Head(*tensors), ctx.options)
        with torch.autocast(tensors[0].device.type, enabled=False):
            for start in range(0, len(tensors[0]), ctx.chunk_rows):
                second.add(slice(start, start + ctx.chunk_rows), directions)
        to_loss, to_lse, to_x, to_weight, to_bias = second.result()
        return to_loss, to_lse, *[None] * 5, to_x, to_weight, to_bias, *[None] * (2 + len(ctx.options))


def _problem(at: slice, logits: Tensor, head: Head, options: Options, by: tuple[Tensor, Tensor, Tensor]) -> Problem:
    return Problem(logits, head.target[at], head.class_weight, options, by[0], by[1])


def _rows(at: slice, head: Head, options: Options, dtype: torch.dtype) -> Tensor:
    x = head.x[at].to(dtype)
    return x if is_soft(head.target) else without_ignored(x, head.target[at], options.ignore_index)


def _logits(x: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    logits = x @ head.weight.to(dtype).t()
    return logits if head.bias is None else logits + head.bias.to(dtype)


def _part(tensor: Tensor | None, at: slice) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 0 else tensor[at]


def _first(
    by_loss: Tensor | None, by_lse: Tensor | None, head: Head, options: Options, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients themselves, in plain torch."""
    dtype = accumulator_dtype(head.x.dtype)
    by = factors(head.x, head.target, head.class_weight, options)
    weight = head.weight.to(dtype)
    to_x, to_weight, to_bias = [], torch.zeros_like(weight), weight.new_zeros(len(weight))
    for start in range(0, len(head.x), chunk_rows):
        at = slice(start, start + chunk_rows)
        x = _rows(at, head, options, dtype)
        problem = _problem(at, _logits(x, head, dtype), head, options, by)
        g = gradient(_part(by_loss, at), _part(by_lse, at), problem)
        to_x.append(g @ weight)
        to_weight = to_weight + g.t() @ x
        to_bias = to_bias + g.sum(0)
    by_x = torch.cat(to_x) if to_x else torch.zeros_like(head.x)
    bias_dtype = head.weight.dtype if head.bias is None else head.bias.dtype
    return by_x.to(head.x.dtype), to_weight.to(head.weight.dtype), to_bias.to(bias_dtype)


class _Second:
    """The gradients of <directions, gradients>, summed over chunks."""

    def __init__(self, by_loss: Tensor | None, by_lse: Tensor | None, head: Head, options: Options) -> None:
        self.by_loss, self.by_lse, self.head, self.options = by_loss, by_lse, head, options
        self.dtype = accumulator_dtype(head.x.dtype)
        self.factors = factors(head.x, head.target, head.class_weight, options)
        self.weight = head.weight.to(self.dtype)
        self.to_loss: list[Tensor] = []
        self.to_lse: list[Tensor] = []
        self.to_x: list[Tensor] = []
        self.to_weight = torch.zeros_like(self.weight)
        self.to_bias = self.weight.new_zeros(len(self.weight))

    def add(self, at: slice, directions: tuple[Tensor | None, ...]) -> None:
        """Add a chunk of rows."""
        v_x, v_weight, v_bias = (None if one is None else one.to(self.dtype) for one in directions)
        x = _rows(at, self.head, self.options, self.dtype)
        logits = _logits(x, self.head, self.dtype)
        u = torch.zeros_like(logits)
        if v_x is not None:
            u = u + v_x[at] @ self.weight.t()
        if v_weight is not None:
            u = u + x @ v_weight.t()
        if v_bias is not None:
            u = u + v_bias
        by_loss, by_lse = _part(self.by_loss, at), _part(self.by_lse, at)
        problem = _problem(at, logits, self.head, self.options, self.factors)
        to_loss, to_lse, s = second_derivative(u, by_loss, by_lse, problem)
        g = gradient(by_loss, by_lse, problem)
        to_x = s @ self.weight
        self.to_x.append(to_x if v_weight is None else to_x + g @ v_weight)
        self.to_weight = self.to_weight + s.t() @ x
        if v_x is not None:
            self.to_weight = self.to_weight + g.t() @ v_x[at]
        self.to_bias = self.to_bias + s.sum(0)
        self.to_loss += [] if to_loss is None else [to_loss]
        self.to_lse += [] if to_lse is None else [to_lse]

    def result(self) -> tuple[Tensor | None, ...]:
        """The gradients by by_loss, by_lse, x, weight and bias, each in its tensor's dtype."""
        head, loss, lse = self.head, self.by_loss, self.by_lse
        return (
            None if loss is None else _joined(self.to_loss, loss),
            None if lse is None else _joined(self.to_lse, lse),
            _joined(self.to_x, head.x),
            self.to_weight.to(head.weight.dtype),
            None if head.bias is None else self.to_bias.to(head.bias.dtype),
        )


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return torch.zeros_like(like)
    return (torch.cat(parts) if like.dim() else torch.stack(parts).sum()).to(like.dtype)
