"""Prefixes of attention: further keys and values in every layer, whatever the architecture.

Transformers' models find their attention function by a name; under ours it puts a module's prefix before the keys and
values and goes on to torch's. Position, padding and causality concern the text alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hybridengine.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from hybridengine.run import Run

__all__ = ["AttentionPrefix"]

_NAME = "hybridengine_prefix"


class AttentionPrefix:
    """The prefix of a run's model, held by a run module that returns `[layers, 2, heads, n, d]` (keys, values).

    Args:
        name: of the run module; it is added between construction and `install`.

    Raises:
        ConfigError: with `train.compile` or another attention than torch's.
        ModelError: the model's attention cannot be reached.

    Attributes:
        seen: keys and values `[1, heads, L, d]` of each attention layer in a trial, in order.
    """

    def __init__(self, run: Run, name: str) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        if run.config.train.compile:
            raise ConfigError(f"{name}: cannot be used with `train.compile: true`; set it to false")
        if run.config.model.attention not in (None, "sdpa"):
            raise ConfigError(f"{name}: needs `model.attention: sdpa`, not {run.config.model.attention!r}")
        self._run, self._name = run, name
        self._model = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
        self.vectors: Tensor | None = None
        found: dict[Any, tuple[Tensor, Tensor]] = {}
        if hasattr(self._model, "set_attn_implementation"):
            AttentionInterface.register(_NAME, _attend)
            AttentionMaskInterface.register(_NAME, sdpa_mask)
            self._model.set_attn_implementation(_NAME)
            found = _attentions(run, self._model)
        if not found:
            raise ModelError(
                f"{name}: {type(self._model).__name__} computes attention by code of its own, where no prefix can be"
                " added; use `prompt-tuning`, or another model"
            )
        self._layers, self.seen = list(found), list(found.values())

    def install(self) -> None:
        """From now on every forward sees the prefix, computed once for all layers."""
        for index, attention in enumerate(self._layers):
            attention.hybridengine_prefix = (self, index)
        self._model.register_forward_pre_hook(self._compute)
        if getattr(self._model.config, "is_encoder_decoder", False):  # generation calls the encoder by itself
            self._model.get_encoder().register_forward_pre_hook(self._compute)

    def _compute(self, model: nn.Module, args: Any) -> None:
        self.vectors = self._run.evaluated(self._name)

    def __deepcopy__(self, memo: Any) -> AttentionPrefix:
        return self  # copies of the model (averages, teachers of themselves) see the run's prefix


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Torch's attention, the module's prefix before keys and values; nothing hides it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found = getattr(module, "hybridengine_prefix", None)
    if found is None:
        module.seen_by_prefix = (key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    prefix, index = found
    own_key, own_value = (p.to(key.dtype).expand(key.shape[0], -1, -1, -1) for p in prefix.vectors[index])
    n, queries, keys = own_key.shape[2], query.shape[2], key.shape[2]
    causal = options.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and queries > 1:
        earlier = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        attention_mask = earlier[None, None]
    if attention_mask is not None:
        visible = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = functional.pad(attention_mask, (n, 0), value=visible)
    if (bias := options.pop("position_bias", None)) is not None:
        options["position_bias"] = functional.pad(bias, (n, 0))
    key, value = torch.cat([own_key, key], 2), torch.cat([own_value, value], 2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **options)


def _attentions(run: Run, model: Any) -> dict[Any, tuple[Tensor, Tensor]]:
    """The attention modules that a forward calls, in order, each with keys and values `[1, heads, L, d]` it saw."""
    ids = torch.arange(3, 9, device=run.device)[None]  # small ids are valid in any vocabulary
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    training = model.training
    with torch.no_grad():
        model.eval()(**inputs)
    model.train(training)
    found = [module for module in model.modules() if hasattr(module, "seen_by_prefix")]
    return {module: vars(module).pop("seen_by_prefix") for module in found}
