"""A tensor that stands for logits, and the operations under which it stays lazy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from hybridengine.kernels import operators
from hybridengine.kernels.cross_entropy import cross_entropy
from hybridengine.kernels.label_row_head import label_row_head
from hybridengine.kernels.lazy_logits.head import Head
from hybridengine.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["LazyLogits"]


class _Node(torch.autograd.Function):
    """The place of lazy logits in autograd's graph, for whoever takes them past `__torch_function__`.

    Another autograd function, for instance, computes them where no graph is recorded; the gradient it gives back comes
    through here all the same.
    """

    @staticmethod
    def forward(ctx: Any, head: Head, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nothing = x.new_empty(0)  # the graph must not hold itself
        ctx.head = head._replace(x=nothing, weight=nothing, bias=None, on_read=None)
        ctx.save_for_backward(x, weight, bias)
        make: Any = Tensor._make_wrapper_subclass
        made: Tensor = make(LazyLogits, head.shape, dtype=head.dtype, device=x.device)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        head = ctx.head._replace(x=x, weight=weight, bias=bias)
        wanted = [one for one, want in zip((x, weight, bias), ctx.needs_input_grad[1:], strict=True) if want]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            found = iter(torch.autograd.grad(head.whole(), wanted, gradient, create_graph=again))
        return None, *(next(found) if want else None for want in ctx.needs_input_grad[1:])


class LazyLogits(Tensor):
    """Logits [..., V] that are not computed yet. `whole()` computes them; so does any operation not listed below."""

    head: Head
    _computed: Tensor | None

    @staticmethod
    def __new__(cls: type[LazyLogits], head: Head) -> LazyLogits:
        """`head` is what they are made of."""
        made: LazyLogits = operators.apply(_Node, head, head.x, head.weight, head.bias)
        made.head, made._computed = head, None
        return made

    def __init__(self, head: Head) -> None:
        pass

    def whole(self) -> Tensor:
        """Return the logits as an ordinary tensor; the second time, the same one."""
        known = self._computed
        if known is None or (torch.is_grad_enabled() and not known.requires_grad):
            known = self._computed = self.head.whole()
        return known

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        lazy = _LAZY.get(func)
        result = NotImplemented if lazy is None else lazy(*args, **options)
        if result is not NotImplemented:
            return result
        return func(*tree_map(_whole, args), **tree_map(_whole, options))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} reached logits that are not computed, past autograd; call `.whole()` on them first")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={self.head.shape}, dtype={self.head.dtype})"


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, LazyLogits) else value


def _with_states(logits: LazyLogits, x: Tensor) -> LazyLogits:
    return LazyLogits(logits.head._replace(x=x))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _reshaped(logits: LazyLogits, *shape: Any) -> Any:
    """`view` and `reshape` that keep the classes together."""
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if len(sizes) < 2 or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    head, leading = logits.head, sizes[:-1]
    if sizes[-1] != head.classes and not (sizes[-1] == -1 and -1 not in leading):
        return NotImplemented
    known = torch.Size(size for size in leading if size != -1).numel()
    if known == 0 or (head.rows != known if -1 not in leading else head.rows % known):
        return NotImplemented
    return _with_states(logits, head.x.reshape(*leading, head.x.shape[-1]))


def _flattened(logits: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = logits.head.x.dim() - 1
    start, end = (dim % (last + 1) for dim in (start_dim, end_dim))
    return _with_states(logits, logits.head.x.flatten(start, end)) if end < last else NotImplemented


def _chunked(logits: LazyLogits, chunks: int, dim: int = 0) -> Any:
    if not 0 <= dim < logits.head.x.dim() - 1:
        return NotImplemented
    return tuple(_with_states(logits, part) for part in logits.head.x.chunk(chunks, dim))


def _chosen(logits: LazyLogits, index: Any) -> Any:
    """Positions by an index that leaves the classes alone; or some classes, whose rows of the head suffice."""
    parts = index if isinstance(index, tuple) else (index,)
    masked = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)
    if (masked and len(parts) > 1) or sum(part is Ellipsis for part in parts) > 1:
        return NotImplemented
    taken = sum(map(_dims_taken, parts))
    dims = logits.head.x.dim()
    if taken < dims and not any(part is Ellipsis for part in parts):
        return _with_states(logits, logits.head.x[parts])
    return _chosen_classes(logits, parts) if taken <= dims else NotImplemented


def _dims_taken(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _chosen_classes(logits: LazyLogits, parts: tuple[Any, ...]) -> Any:
    *positions, classes = parts
    head = logits.head
    if isinstance(classes, slice) and classes == slice(None):
        return _with_states(logits, head.x[parts])
    plain = all(isinstance(part, slice) or part is Ellipsis for part in positions)
    of_rows = isinstance(classes, Tensor) and classes.dim() == 1 and classes.dtype == torch.int64
    if not plain or not of_rows or head.scale != 1.0 or head.squashed:
        return NotImplemented
    x, weight, bias = head._replace(x=head.x[tuple(positions)]).as_made()
    return label_row_head(x, weight, classes, bias=bias).to(head.dtype)


# ---- values ----------------------------------------------------------------------------------------------------------


def _cast(logits: LazyLogits, dtype: torch.dtype) -> LazyLogits:
    return LazyLogits(logits.head._replace(dtype=dtype))


def _to(logits: LazyLogits, *args: Any, **options: Any) -> Any:
    """`to(dtype)`, or `to(device)` where they are."""
    if options or len(args) != 1 or isinstance(args[0], Tensor):
        return NotImplemented
    if isinstance(args[0], torch.dtype):
        return _cast(logits, args[0])
    return logits if torch.device(args[0]) == logits.head.x.device else NotImplemented


def _unchanged(logits: LazyLogits, *_: Any, **__: Any) -> LazyLogits:
    return logits


def _detached(logits: LazyLogits) -> LazyLogits:
    head = logits.head
    bias = None if head.bias is None else head.bias.detach()
    return LazyLogits(head._replace(x=head.x.detach(), weight=head.weight.detach(), bias=bias))


def _times(logits: Any, factor: Any) -> Any:
    if isinstance(factor, LazyLogits):
        logits, factor = factor, logits
    return LazyLogits(logits.head.scaled(factor)) if isinstance(factor, int | float) else NotImplemented


def _divided(logits: Any, divisor: Any) -> Any:
    fits = isinstance(logits, LazyLogits) and isinstance(divisor, int | float) and divisor != 0
    return LazyLogits(logits.head.scaled(1.0 / divisor)) if fits else NotImplemented


def _squashed(logits: LazyLogits) -> Any:
    return NotImplemented if logits.head.squashed else LazyLogits(logits.head._replace(squashed=True))


def _plus(logits: Any, other: Any) -> Any:
    """A further bias of the classes (BART's `final_logits_bias`)."""
    if isinstance(other, LazyLogits):
        logits, other = other, logits
    head = logits.head
    if head.squashed or head.scale != 1.0 or not isinstance(other, Tensor) or isinstance(other, LazyLogits):
        return NotImplemented
    if other.shape[-1:] != (head.classes,) or other.numel() != head.classes or other.dim() > head.x.dim():
        return NotImplemented
    further = other.reshape(-1)
    return LazyLogits(head._replace(bias=further if head.bias is None else head.bias + further))


# ---- losses ----------------------------------------------------------------------------------------------------------


def _torch_cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Any = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if size_average is not None or reduce is not None:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    loss = _our_cross_entropy(input, target, weight=weight, **options)
    return loss if loss is NotImplemented else loss.to(input.head.dtype)  # torch's loss has the logits' dtype


def _our_cross_entropy(logits: Any, target: Tensor, *, weight: Tensor | None = None, **options: Any) -> Any:
    if not isinstance(logits, LazyLogits) or isinstance(target, LazyLogits) or logits.head.x.dim() > 2:
        return NotImplemented
    head = logits.head
    scale, softcap = head.softcap()
    if softcap is not None and (options.get("softcap") is not None or options.get("scale", 1.0) != 1.0):
        return NotImplemented  # a softcap of a softcap
    if options.pop("impl", None) is not None:
        return NotImplemented  # a wish that concerns another kernel
    options.pop("inplace", None)
    options["scale"] = options.get("scale", 1.0) * scale
    options["softcap"] = options.get("softcap") if softcap is None else softcap
    return linear_cross_entropy(head.x, head.weight, target, bias=head.bias, class_weight=weight, **options)


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point", "is_complex")),
}
_LAZY: dict[Any, Callable[..., Any]] = {
    cross_entropy: _our_cross_entropy,
    functional.cross_entropy: _torch_cross_entropy,
    Tensor.__getitem__: _chosen,
    Tensor.contiguous: _unchanged,
    Tensor.detach: _detached,
    Tensor.double: lambda logits: _cast(logits, torch.float64),
    Tensor.float: lambda logits: _cast(logits, torch.float32),
    Tensor.to: _to,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshaped),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flattened),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _chunked),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _times),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), _divided),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _squashed),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _plus),
}
