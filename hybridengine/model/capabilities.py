"""What a model can do, told by its configuration and its modules."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["capabilities_of"]


def capabilities_of(model_config: Any, model: nn.Module | None = None) -> set[str]:
    """What a model provides to methods: `embeddings`, and `dropout` where any probability is above 0."""
    found = {"embeddings"}
    if model is not None:
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
            found.add("dropout")
        return found
    values = model_config.to_dict()
    if any(_is_dropout(key) and isinstance(value, int | float) and value > 0 for key, value in values.items()):
        found.add("dropout")
    return found


def _is_dropout(key: str) -> bool:
    return ("drop" in key or key.endswith("_pdrop")) and not key.startswith("layerdrop") and "path" not in key
