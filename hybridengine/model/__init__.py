"""Pretrained models: loading them, what they can do, and how deep each parameter stands."""

from hybridengine.model.adapters import (
    freeze_pretrained,
    linear_targets,
    named,
    new_heads,
    task_type,
    transposed,
    wrap_by_peft,
)
from hybridengine.model.capabilities import capabilities_of
from hybridengine.model.depth import layer_stacks, parameter_levels
from hybridengine.model.loading import (
    choose_device,
    hub_or_cache,
    load_frozen,
    load_model,
    load_model_config,
    load_tokenizer,
    quiet,
)
from hybridengine.model.prefix import AttentionPrefix

__all__ = [
    "AttentionPrefix",
    "capabilities_of",
    "choose_device",
    "freeze_pretrained",
    "hub_or_cache",
    "layer_stacks",
    "linear_targets",
    "load_frozen",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "named",
    "new_heads",
    "parameter_levels",
    "quiet",
    "task_type",
    "transposed",
    "wrap_by_peft",
]
