"""Where logits read the last layer at its first position only, a training pass computes the last layer only there.

A classifier on a BERT-type encoder pools position 0. Keys and values of the last layer are then needed everywhere;
queries, attention's projection and the feed-forward block, five sixths of its matrix products, are not. Logits and
gradients stay what they were, up to rounding; a small encoder of six layers is spared a seventh of its work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hybridengine.seams.overriding import override_forward

__all__ = ["FirstPosition"]

Short = Callable[[Any, Tensor, Tensor | None], Tensor]
"""What a layer gives at position 0, `[B, 1, D]`, of hidden states `[B, L, D]` and an attention mask."""


class FirstPosition:
    """The last layer of an encoder, computed at position 0 alone while armed."""

    def __init__(self, layer: nn.Module, short: Short) -> None:
        self._layer, self._class, self._armed = layer, type(layer), False

        def wrap(whole: Callable[..., Any]) -> Callable[..., Any]:
            def forward(layer: Any, states: Tensor, attention_mask: Tensor | None = None, *a: Any, **k: Any) -> Any:
                if self._armed:
                    return short(layer, states, attention_mask)
                return whole(layer, states, attention_mask, *a, **k)

            return forward

        override_forward(layer, wrap)

    @classmethod
    @torch.no_grad()
    def find(cls, model: nn.Module, inputs: Mapping[str, Tensor]) -> FirstPosition | None:
        """The shortcut through `model`, or None where its logits need more than the first position.

        That is measured, not believed: with every other position of the last layer's output made NaN the logits of
        `inputs` must stay finite, and the shortcut must give the same ones. A model whose inner outputs somebody
        watches with forward hooks is left alone.
        """
        last = _last_layer(model)
        if last is None:
            return None
        training = model.training
        try:
            expected = _logits_of_first(model.eval(), *last, inputs)
            if expected is None:
                return None
            found = cls(*last)
            try:
                with found.armed():
                    logits = model(**inputs).logits
            except (RuntimeError, ValueError, IndexError):  # what stands above needs the other positions' places
                logits = torch.empty(0)
            if logits.shape == expected.shape and _close(logits, expected):
                return found
            found.remove()
            return None
        finally:
            model.train(training)

    def remove(self) -> None:
        """Give the layer its own class back."""
        self._layer.__class__ = self._class

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Forwards inside compute the last layer at its first position only: `[B, 1, D]` leaves the encoder."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False


def _logits_of_first(model: nn.Module, layer: nn.Module, short: Short, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Logits of a whole forward, if they read position 0 alone and `short` is the layer's own formula."""
    agree: list[bool] = []

    def spoil(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Tensor:
        mask = args[1] if len(args) > 1 else options.get("attention_mask")
        try:
            agree.append(_close(short(layer, args[0], mask), output[:, :1]))
        except (AttributeError, TypeError, RuntimeError):  # a version of transformers that names its parts otherwise
            agree.append(False)
            return output
        return torch.cat([output[:, :1], torch.full_like(output[:, 1:], torch.nan)], 1)

    handle = layer.register_forward_hook(spoil, with_kwargs=True)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return logits if agree == [True] and bool(logits.isfinite().all()) else None


def _close(a: Tensor, b: Tensor) -> bool:
    # Another order of summation moves fp32 states of size 1 by some 1e-6; another formula by their own size.
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def _last_layer(model: nn.Module) -> tuple[nn.Module, Short] | None:
    """The last layer of the only known encoder, if nobody changed its forward or watches it or what holds it."""
    modules = dict(model.named_modules())
    last = [(name, layers[-1]) for name, layers in modules.items() if isinstance(layers, nn.ModuleList) and len(layers)]
    known = [(name, layer, _SHORT[_name(layer)]) for name, layer in last if _name(layer) in _SHORT]
    if len(known) != 1:
        return None
    name, layer, short = known[0]
    above = (module for other, module in modules.items() if f"{name}.".startswith(f"{other}." if other else ""))
    changed = "forward" in vars(layer) or getattr(layer, "is_overridden", False)
    if changed or any(module._forward_hooks for module in (layer, *above)):
        return None
    return layer, short


def _name(layer: nn.Module) -> str:
    kind = type(layer)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the first position's query `[B, 1, D]` to every key; the mask is boolean or additive."""
    heads = (-1, attention.attention_head_size)
    q, k, v = (x.view(*x.shape[:2], *heads).transpose(1, 2) for x in (query, key, value))
    dropout = attention.dropout.p if attention.training else 0.0
    mask = None if mask is None else mask[..., :1, :]
    return functional.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


def _bert(layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    attention, first = layer.attention.self, hidden[:, :1]
    context = _attend(attention, attention.query(first), attention.key(hidden), attention.value(hidden), mask)
    short: Tensor = layer.feed_forward_chunk(layer.attention.output(context, first))
    return short


def _distilbert(layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    attention, first = layer.attention, hidden[:, :1]
    context = _attend(attention, attention.q_lin(first), attention.k_lin(hidden), attention.v_lin(hidden), mask)
    attended = layer.sa_layer_norm(attention.out_lin(context) + first)
    short: Tensor = layer.output_layer_norm(layer.ffn(attended) + attended)
    return short


_SHORT: dict[str, Short] = {
    "BertLayer": _bert,
    "RobertaLayer": _bert,
    "XLMRobertaLayer": _bert,
    "CamembertLayer": _bert,
    "ElectraLayer": _bert,
    "ErnieLayer": _bert,
    "TransformerBlock": _distilbert,
}
