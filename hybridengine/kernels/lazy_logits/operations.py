"""The operations under which logits stay lazy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.kernels.cross_entropy import cross_entropy
from hybridengine.kernels.label_row_head import label_row_head
from hybridengine.kernels.lazy_logits.tensor import LazyLogits
from hybridengine.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["HANDLERS"]


def _derived(logits: LazyLogits, **changes: Any) -> LazyLogits:
    logits.check_unchanged()
    return LazyLogits(logits.head._replace(**changes), logits._family)


def _with_states(logits: LazyLogits, x: Tensor) -> LazyLogits:
    return _derived(logits, x=x)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _reshaped(logits: LazyLogits, *shape: Any) -> Any:
    """`view` and `reshape` that keep the classes together."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
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
    if not all(map(_is_known, parts)):
        return NotImplemented
    masked = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)
    if (masked and len(parts) > 1) or sum(part is Ellipsis for part in parts) > 1:
        return NotImplemented
    taken = sum(map(_dims_taken, parts))
    dims = logits.head.x.dim()
    if taken < dims and not any(part is Ellipsis for part in parts):
        return _with_states(logits, logits.head.x[parts])
    return _chosen_classes(logits, parts) if taken <= dims else NotImplemented


def _is_known(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.dtype in (torch.int64, torch.bool) and not isinstance(part, LazyLogits)
    return part is None or part is Ellipsis or isinstance(part, slice) or type(part) is int


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
    rows = torch.where(classes < 0, classes + head.classes, classes)  # negative ones count from the end
    return label_row_head(x, weight, rows, bias=bias).to(head.dtype)


# ---- values ----------------------------------------------------------------------------------------------------------


def _cast(logits: LazyLogits, dtype: torch.dtype) -> Any:
    """A cast that loses nothing; one that does must keep its place among scale, tanh and bias."""
    head = logits.head
    widens = dtype.is_floating_point and torch.promote_types(dtype, head.dtype) == dtype
    alone = dtype == torch.float32 and head.scale == 1.0 and not head.squashed
    if not widens and not alone:
        return NotImplemented
    return _derived(logits, dtype=dtype)


def _to(logits: LazyLogits, *args: Any) -> Any:
    """`to(dtype)`, or `to(device)` where they are."""
    if len(args) != 1 or not isinstance(args[0], torch.dtype | torch.device | str):
        return NotImplemented
    if isinstance(args[0], torch.dtype):
        return _cast(logits, args[0])
    return logits if torch.device(args[0]) == logits.head.x.device else NotImplemented


def _unchanged(logits: LazyLogits) -> LazyLogits:
    return logits


def _detached(logits: LazyLogits) -> LazyLogits:
    head = logits.head
    bias = None if head.bias is None else head.bias.detach()
    return _derived(logits, x=head.x.detach(), weight=head.weight.detach(), bias=bias)


def _times(logits: Any, factor: Any) -> Any:
    if isinstance(factor, LazyLogits):
        logits, factor = factor, logits
    if type(factor) not in (int, float) or (logits.head.squashed and factor <= 0):
        return NotImplemented
    return _scaled(logits, factor)


def _divided(logits: Any, divisor: Any) -> Any:
    fits = isinstance(logits, LazyLogits) and type(divisor) in (int, float) and divisor > 0
    return _scaled(logits, 1.0 / divisor) if fits else NotImplemented


def _scaled(logits: LazyLogits, factor: float) -> LazyLogits:
    return _derived(logits, **logits.head.scaled(factor)._asdict())


def _squashed(logits: LazyLogits) -> Any:
    return NotImplemented if logits.head.squashed else _derived(logits, squashed=True)


def _plus(logits: Any, other: Any) -> Any:
    """A further bias of the classes (BART's `final_logits_bias`)."""
    if isinstance(other, LazyLogits):
        logits, other = other, logits
    head = logits.head
    if head.squashed or head.scale != 1.0 or not isinstance(other, Tensor) or isinstance(other, LazyLogits):
        return NotImplemented
    if other.shape[-1:] != (head.classes,) or other.numel() != head.classes or other.dim() > head.x.dim():
        return NotImplemented
    if torch.promote_types(other.dtype, head.dtype) != head.dtype:
        return NotImplemented
    further = other.reshape(-1)
    return _derived(logits, bias=further if head.bias is None else head.bias + further)


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
    if loss is NotImplemented or torch.is_autocast_enabled(loss.device.type):
        return loss  # under autocast torch's is float32 too
    return loss.to(input.head.dtype)  # elsewhere it has the logits' dtype


def _our_cross_entropy(logits: Any, target: Tensor, *, weight: Tensor | None = None, **options: Any) -> Any:
    if not isinstance(logits, LazyLogits) or isinstance(target, LazyLogits) or logits.head.x.dim() > 2:
        return NotImplemented
    if not target.is_floating_point() and target.dtype != torch.int64:
        return NotImplemented
    logits.check_unchanged()
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


_NO_NAMES: frozenset[str] = frozenset()
_OURS = frozenset(inspect.signature(cross_entropy).parameters)
_TORCHS = frozenset(inspect.signature(functional.cross_entropy).parameters)
_FLATTEN, _CHUNK = frozenset(("start_dim", "end_dim")), frozenset(("chunks", "dim"))
HANDLERS: dict[Any, tuple[Callable[..., Any], frozenset[str]]] = {
    cross_entropy: (_our_cross_entropy, _OURS),
    functional.cross_entropy: (_torch_cross_entropy, _TORCHS),
    Tensor.__getitem__: (_chosen, _NO_NAMES),
    Tensor.contiguous: (_unchanged, _NO_NAMES),
    Tensor.detach: (_detached, _NO_NAMES),
    Tensor.double: (lambda logits: _cast(logits, torch.float64), _NO_NAMES),
    Tensor.float: (lambda logits: _cast(logits, torch.float32), _NO_NAMES),
    Tensor.to: (_to, _NO_NAMES),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), (_reshaped, _NO_NAMES)),
    **dict.fromkeys((Tensor.flatten, torch.flatten), (_flattened, _FLATTEN)),
    **dict.fromkeys((Tensor.chunk, torch.chunk), (_chunked, _CHUNK)),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), (_times, _NO_NAMES)),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), (_divided, _NO_NAMES)),
    **dict.fromkeys((Tensor.tanh, torch.tanh), (_squashed, _NO_NAMES)),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), (_plus, _NO_NAMES)),
}
