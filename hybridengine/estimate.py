"""Memory before anything is loaded: parameters counted on a model without storage."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from hybridengine.errors import HybridEngineError
from hybridengine.model.loading import quiet
from hybridengine.plugin.calling import Hooks
from hybridengine.plugin.stacking import Method
from hybridengine.run import Run

__all__ = ["estimate_memory"]


def estimate_memory(run: Run, methods: Sequence[Method]) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer state (two fp32 moments) of the adapted model.

    The model is built on the meta device from its configuration alone. Methods that build another model
    (`build_model`) or need real weights leave the estimate at the task's plain model, and `exact` says so.
    """
    import transformers

    config = run.model_config
    options = {k: v for k, v in run.task.model_options(run).items() if hasattr(config, k) or k in ("num_labels",)}
    try:
        with torch.device("meta"), quiet():
            shaped = type(config).from_dict({**config.to_dict(), **options})
            model = getattr(transformers, run.task.auto_class).from_config(shaped)
    except (ValueError, AttributeError, RuntimeError, TypeError):
        return {"exact": False}
    # Copies: a plugin may keep what it learns from the model it transforms.
    hooks = Hooks([dataclasses.replace(m, plugin=copy.deepcopy(m.plugin)) for m in methods])
    exact = not hooks.implementations("build_model")
    if exact:
        try:
            model = hooks.transform("transform_model", run, model, expect=torch.nn.Module)
        except (NotImplementedError, RuntimeError, HybridEngineError):
            exact = False
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "exact": exact,
        "parameters": total,
        "trainable": trainable,
        "weights_bytes": 4 * total,
        "gradient_bytes": 4 * trainable,
        "optimizer_bytes": 8 * trainable,
    }
