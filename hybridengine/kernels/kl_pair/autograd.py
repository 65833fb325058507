"""The operator's schema and its derivatives of every order, whatever implementation the operator has.

The operator returns the loss together with its *unit gradients*: d loss / d a and d loss / d b for an incoming gradient
of 1 (for "none" each row's own), each only if it is asked for. First-order training multiplies them by the incoming
gradient, in place, and gives them away. All else (create_graph, torch.func) goes through the plain torch of
`derivatives.py`, which has derivatives of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import operators
from hybridengine.kernels.kl_pair.derivatives import REDUCTIONS, Options, count_of, unit_gradients
from hybridengine.kernels.kl_pair.reference import wide_dtype
from hybridengine.kernels.modes import forward_mode
from hybridengine.kernels.scaling import scale_rows

__all__ = ["run_operator"]


def _fake(
    a: Tensor, b: Tensor, mask: Tensor | None, temperature: float, direction: int, reduction: int, *rest: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, want_a, want_b = rest
    loss = a.new_empty((a.shape[0],) if reduction == REDUCTIONS["none"] else (), dtype=wide_dtype(a, b))
    return loss, a.new_empty(a.shape if want_a else (0,)), b.new_empty(b.shape if want_b else (0,))


operators.define(
    "kl_pair(Tensor a, Tensor b, Tensor? mask, float temperature, int direction, int reduction, bool empty_is_zero, "
    "bool want_a, bool want_b, str impl) -> (Tensor loss, Tensor by_a, Tensor by_b)",
    _fake,
)

_Outputs = tuple[Tensor, Tensor, Tensor]
_OTHERS = (None,) * 8  # the arguments after a and b


class _KLPair(torch.autograd.Function):
    """The loss in ordinary eager mode and under torch.compile.

    Apart from `_Transformable` because a `setup_context` costs an `inspect.signature` a call, and because a function
    that torch.func transforms may save only what it returns.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, mask: Tensor | None, want_a: bool, want_b: bool, impl: str, *options: Any
    ) -> Tensor:
        loss: Tensor
        loss, by_a, by_b = torch.ops.hybridengine.kl_pair(a, b, mask, *options, want_a, want_b, impl)
        ctx.options, ctx.impl, ctx.given_away = options, impl, False
        ctx.save_for_backward(a, b, mask, by_a, by_b)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grad_loss), *_OTHERS


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b, mask, by_a, by_b = ctx.saved_tensors
    want_a, want_b, *_ = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return _product(by_a, grad_loss, a) if want_a else None, _product(by_b, grad_loss, b) if want_b else None
    if torch.is_grad_enabled() or forward_mode() or _is_transformed(grad_loss, a, b):
        by_a, by_b = unit_gradients(a, b, mask, Options(*ctx.options))
        return _product(by_a, grad_loss, a) if want_a else None, _product(by_b, grad_loss, b) if want_b else None
    count = a.numel()
    if ctx.given_away or (want_a and by_a.numel() != count) or (want_b and by_b.numel() != count):
        _, by_a, by_b = torch.ops.hybridengine.kl_pair(a, b, mask, *ctx.options, want_a, want_b, ctx.impl)
    # The caller may keep a buffer as .grad and add to it: a second backward computes new ones.
    ctx.given_away = True
    for by, want in ((by_a, want_a), (by_b, want_b)):
        if want:
            scale_rows(by, grad_loss)  # the check of saved tensors does not see it: `given_away` stands for it
    return by_a if want_a else None, by_b if want_b else None


class _Transformable(torch.autograd.Function):
    """The loss under torch.func."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, mask: Tensor | None, want_a: bool, want_b: bool, impl: str, *options: Any
    ) -> _Outputs:
        outputs: _Outputs = torch.ops.hybridengine.kl_pair(a, b, mask, *options, want_a, want_b, impl)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Outputs) -> None:
        a, b, mask, _, _, impl, *options = inputs
        ctx.options, ctx.impl, ctx.given_away = options, impl, False
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, mask, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = (None, None) if grad_loss is None else _backward(ctx, grad_loss)
        return *gradients, *_OTHERS

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, mask: Tensor | None, *rest: Any
    ) -> tuple[_Outputs, tuple[int, int, int]]:
        """Run a batch of B problems as one of B*N rows, then reduce each problem for itself."""
        want_a, want_b, impl, *flat_options = rest
        options = Options(*flat_options)
        a, b = (_batch_first(x, dim, info.batch_size) for x, dim in zip((a, b), in_dims, strict=False))
        flat_mask = None
        if mask is not None:
            mask = _batch_first(mask, in_dims[2], info.batch_size)
            flat_mask = mask.flatten()
        rows = options._replace(reduction=REDUCTIONS["none"])
        loss, *units = operators.apply(
            _Transformable, a.flatten(0, 1), b.flatten(0, 1), flat_mask, want_a, want_b, impl, *rows
        )
        by_a, by_b = (
            unit.view(a.shape) if want else unit.expand(info.batch_size, 0)
            for unit, want in zip(units, (want_a, want_b), strict=True)
        )
        return _reduce_each((loss.view(a.shape[:2]), by_a, by_b), mask, options), (0, 0, 0)


def _reduce_each(outputs: _Outputs, mask: Tensor | None, options: Options) -> _Outputs:
    """Reduce the row losses [B, N] of each problem and scale their gradients [B, N, V] (or [B, 0]) alike."""
    loss, by_a, by_b = outputs
    if options.reduction == REDUCTIONS["none"]:
        return outputs
    if options.reduction == REDUCTIONS["sum"]:
        return loss.sum(1), by_a, by_b
    count = count_of(loss, mask).expand(loss.shape[0])
    divisor = count.clamp_min(1.0)
    nothing = 0.0 if options.empty_is_zero else float("nan")
    mean = torch.where(count == 0, nothing, loss.sum(1) / divisor)
    by_a, by_b = (_times_rows(x, 1.0 / divisor[:, None]).to(x.dtype) if x.dim() == 3 else x for x in (by_a, by_b))
    return mean, by_a, by_b


def _batch_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _times_rows(matrix: Tensor, factor: Tensor) -> Tensor:
    """Multiply [.., V] by a scalar or by its rows' factors [..]."""
    return matrix * (factor.unsqueeze(-1) if factor.dim() else factor)


def _product(unit: Tensor, factor: Tensor, logits: Tensor) -> Tensor:
    """Return the gradient by `logits`, in their dtype."""
    return _times_rows(unit, factor).to(logits.dtype)


def _is_transformed(*tensors: Tensor) -> bool:
    """Whether one only stands for another tensor, in torch.func or a batched backward (`is_grads_batched`)."""
    is_wrapped, has_storage = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._has_storage
    return any(is_wrapped(one) or not has_storage(one) for one in tensors)


def _wanted(tensor: Tensor, transformed: bool) -> bool:
    # A batched tensor hides whether a gradient of it is wanted: assume so.
    hidden = transformed and torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return torch.is_grad_enabled() and (hidden or tensor.requires_grad)


def run_operator(a: Tensor, b: Tensor, mask: Tensor | None, impl: str, options: Options) -> Tensor:
    """Return the loss through the operator."""
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    want_a, want_b = _wanted(a, transformed), _wanted(b, transformed)
    loss: Tensor
    if not (want_a or want_b or transformed):
        loss = torch.ops.hybridengine.kl_pair(a, b, mask, *options, False, False, impl)[0]
        return loss
    if transformed:
        loss = operators.apply(_Transformable, a, b, mask, want_a, want_b, impl, *options)[0]
    else:
        loss = operators.apply(_KLPair, a, b, mask, want_a, want_b, impl, *options)
    return loss
