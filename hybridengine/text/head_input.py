"""What a language model's output layer reads: the states from which it makes the vocabulary's logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError

__all__ = ["HeadInput"]


class HeadInput:
    """Keeps the input of the output layer in each forward, and spares that layer all but one position of its work.

    Args:
        model: a language model with `get_output_embeddings`.
        tokenizer: for a short text on which it is proved that the layer is used.

    Attributes:
        layer: the output layer.
        makes_logits: whether it works on every position, as inside `whole`.

    Raises:
        ModelError: there is no such layer, it is not linear, or a forward does not call it.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        what = f"{type(model).__name__} has no output layer whose input could be read"
        way = "; use a template with label words in place of learned ones, or another model"
        if layer is None or not isinstance(getattr(layer, "weight", None), Tensor) or layer.weight.dim() != 2:
            raise ModelError(what + way)
        self.layer: Any = layer
        self.makes_logits = False
        self._states: Tensor | None = None
        handle = layer.register_forward_pre_hook(self._before)
        ids = torch.tensor([tokenizer("a")["input_ids"] or [0]], device=next(model.parameters()).device)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if self._states is None or self._states.shape[:2] != ids.shape:
            handle.remove()
            raise ModelError(what + way)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.makes_logits:
            return args
        self._states = args[0]
        # The last position, for logits that read the first alone would look like those of a classifier.
        return (args[0][:, -1:], *args[1:])

    def take(self) -> Tensor:
        """What the layer read in the last forward, `[B, L, D]`; kept no longer, for a graph hangs on it."""
        assert self._states is not None, "no forward since the last time"
        states, self._states = self._states, None
        return states

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Forwards inside make the logits of every position."""
        before, self.makes_logits = self.makes_logits, True
        try:
            yield
        finally:
            self.makes_logits = before
