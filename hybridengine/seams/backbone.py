"""What lies below a model's head: run once, and then the head alone as often as wanted, on the same states."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine.seams.overriding import override_forward

__all__ = ["Backbone"]

_STATES = ("last_hidden_state", "pooler_output")
"""What a head reads of a backbone's outputs."""


class Backbone:
    """The part of a model below its head, as transformers splits them; `kept` makes later passes run the head alone."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._change: Callable[[Tensor], Tensor] | None = None
        self._armed = False
        self.keeps = False
        """Whether passes are to be kept."""
        self._kept: Any = None
        self._owner: tuple[object, ...] = ()

        def wrap(whole: Callable[..., Any]) -> Callable[..., Any]:
            def forward(module: Any, *args: Any, **options: Any) -> Any:
                if not self._armed or module is not self._module:  # a copy of the model has a backbone of its own
                    return whole(module, *args, **options)
                if self._kept is None:
                    self._kept = whole(module, *args, **options)
                return self._kept if self._change is None else _changed(self._kept, self._change)

            return forward

        override_forward(module, wrap)

    @classmethod
    @torch.no_grad()
    def find(cls, model: nn.Module, inputs: Mapping[str, Tensor]) -> Backbone | None:
        """The backbone of `model`, or None where its head cannot run alone.

        That is measured, not believed: a pass must run the backbone once, and the head must give the logits of
        `inputs` again from what it returned.
        """
        wrapped: Any = model
        whole = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped  # inside PEFT's
        module = getattr(whole, "base_model", whole)
        if module is whole or not isinstance(module, nn.Module):
            return None
        calls: list[Any] = []
        handle = module.register_forward_hook(lambda module, args, output: calls.append(output))
        training = model.training
        try:
            expected = model.eval()(**inputs).logits
            handle.remove()
            if len(calls) != 1 or not any(isinstance(getattr(calls[0], name, None), Tensor) for name in _STATES):
                return None
            found = cls(module)
            with found.kept():
                for _ in range(2):
                    with found.armed(inputs):
                        logits = model(**inputs).logits
            return found if torch.equal(logits, expected) else None
        finally:
            handle.remove()
            model.train(training)

    @contextlib.contextmanager
    def kept(self, change: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
        """What the first armed pass inside computes, later ones of the same owner get.

        Args:
            change: what becomes of the states (hidden states `[B, L, D]`, pooled ones `[B, D]`) in every pass.
        """
        before = self.keeps, self._change, self._kept, self._owner
        self.keeps, self._change, self._kept, self._owner = True, change, None, ()
        try:
            yield
        finally:
            self.keeps, self._change, self._kept, self._owner = before

    def holds(self, *owner: object) -> bool:
        """Whether a pass for these inputs has been kept and needs no other."""
        return self.keeps and self._kept is not None and self._is(owner)

    @contextlib.contextmanager
    def armed(self, *owner: object) -> Iterator[None]:
        """One pass inside, for inputs named by `owner`; others than the first one's are computed as ever."""
        if self.keeps and not self._owner:
            self._owner = owner
        self._armed = self.keeps and self._is(owner)
        try:
            yield
        finally:
            self._armed = False

    def _is(self, owner: tuple[object, ...]) -> bool:
        return len(owner) == len(self._owner) and all(a is b for a, b in zip(owner, self._owner, strict=True))


def _changed(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a backbone's outputs with its states changed."""
    changed = copy.copy(outputs)
    for name in _STATES:
        if isinstance(value := getattr(outputs, name, None), Tensor):
            setattr(changed, name, change(value))
    return changed
