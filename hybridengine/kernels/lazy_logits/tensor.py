"""A tensor that stands for logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hybridengine.kernels import operators
from hybridengine.kernels.lazy_logits.head import Head

__all__ = ["LAZY", "LazyLogits"]

LAZY: dict[Any, tuple[Callable[..., Any], frozenset[str]]] = {}
"""Functions under which logits stay lazy (`operations.py`): what does it, and by which names arguments may be given."""

_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point", "is_complex")),
}


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
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # By aliases, at which autograd's search ends: x itself may depend on the head (tied embeddings).
            x, weight, bias = (
                None if one is None else one.view_as(one) if again else one.detach().requires_grad_()
                for one in ctx.saved_tensors
            )
            both = zip((x, weight, bias), ctx.needs_input_grad[1:], strict=True)
            wanted = [one for one, want in both if want and one is not None]
            logits = ctx.head._replace(x=x, weight=weight, bias=bias).computed()
            found = iter(torch.autograd.grad(logits, wanted, gradient, create_graph=again))
        return None, *(next(found) if want else None for want in ctx.needs_input_grad[1:])


class LazyLogits(Tensor):
    """Logits [..., V] that are not computed yet. `whole()` computes them; so does any operation not listed below.

    Once computed they are ordinary: every later operation takes the computed ones, and sees what was changed in them.
    """

    head: Head
    _computed: Tensor | None
    _family: list[int]  # how many share this head: an operation in place on one would not be seen by the others
    _versions: tuple[int, ...]

    @staticmethod
    def __new__(cls: type[LazyLogits], head: Head, family: list[int] | None = None) -> LazyLogits:
        """`head` is what they are made of; `family` is given for what is derived from other lazy logits."""
        made: LazyLogits = operators.apply(_Node, head, head.x, head.weight, head.bias)
        made.head, made._computed, made._versions = head, None, head.versions()
        made._family = [0] if family is None else family
        made._family[0] += 1
        return made

    def __init__(self, head: Head, family: list[int] | None = None) -> None:
        pass

    def whole(self) -> Tensor:
        """Return the logits as an ordinary tensor with its graph; the second time, the same one.

        Raises:
            RuntimeError: if the head or its input was changed meanwhile, by an optimizer for instance.
        """
        if self._computed is None:
            self.check_unchanged()
            with torch.enable_grad():
                self._computed = self.head.whole()
        return self._computed

    def check_unchanged(self) -> None:
        """Raise if what the logits are made of is no longer what it was."""
        if self.head.versions() != self._versions:
            raise RuntimeError(
                "these logits were not computed yet, and their head or its input has changed since; read them (or call"
                " `.whole()`) before the optimizer's step"
            )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        handler = LAZY.get(func)
        if handler is not None and not any(isinstance(one, LazyLogits) and one._computed is not None for one in args):
            lazy, names = handler
            result = lazy(*args, **options) if options.keys() <= names else NotImplemented
            if result is not NotImplemented:
                return result
        _refuse_unseen_change(func, args, options)
        return func(*tree_map(_whole, args), **tree_map(_whole, options))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} reached logits that are not computed, past autograd; call `.whole()` on them first")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={self.head.shape}, dtype={self.head.dtype})"


def _refuse_unseen_change(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Refuse to change logits in place of which others were made that would not hear of it."""
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in options
    target = options.get("out", args[0] if args else None)
    if in_place and isinstance(target, LazyLogits) and target._computed is None and target._family[0] > 1:
        raise RuntimeError(
            f"{name} would change logits in place after others were made of them (a view, a cast), which are not"
            " computed yet and would not see it; call `.whole()` on the first ones and work with that"
        )


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, LazyLogits) else value
