"""Pretrained models: loading them, what they can do, and how deep each parameter stands."""

from hybridengine.model.depth import parameter_levels
from hybridengine.model.loading import (
    capabilities_of,
    choose_device,
    hub_or_cache,
    load_model,
    load_model_config,
    load_tokenizer,
    quiet,
)

__all__ = [
    "capabilities_of",
    "choose_device",
    "hub_or_cache",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "parameter_levels",
    "quiet",
]
