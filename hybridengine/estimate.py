"""Steps and memory before anything is loaded: parameters counted on a model without storage."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hybridengine.errors import HybridEngineError
from hybridengine.model.loading import quiet
from hybridengine.plugin.calling import Hooks
from hybridengine.plugin.stacking import Method
from hybridengine.run import Run
from hybridengine.seams.soft_tokens import SoftTokens

__all__ = ["estimate_memory", "estimate_steps"]


class _Unknown(list[str]):
    """Names that only loading tells; whether anybody asked for them."""

    asked = False

    def __iter__(self) -> Iterator[str]:
        self.asked = True
        return super().__iter__()

    def __contains__(self, name: object) -> bool:
        self.asked = True
        return super().__contains__(name)

    def __len__(self) -> int:
        self.asked = True
        return super().__len__()


def estimate_steps(run: Run, hooks: Hooks, draws: int | None = None) -> tuple[int, int]:
    """Optimizer steps per epoch and in all; before the features exist, from the row count.

    Args:
        draws: micro-batches of an epoch, once they are known.
    """
    train = run.config.train
    if draws is None:
        sampler = hooks.build("build_sampler", run, "train")
        rows = len(run.splits["train"])
        draws = len(sampler(0)) if sampler is not None else -(-rows // train.batch_size)
    per_epoch = max(1, -(-draws // train.accumulate))
    return per_epoch, train.max_steps or max(1, round(train.epochs * per_epoch))


def estimate_memory(run: Run, methods: Sequence[Method]) -> dict[str, Any]:
    """Bytes of weights, gradients and what the methods keep (moments, averages), in fp32, of the adapted model.

    The model is built on the meta device from its configuration alone. Methods that build another model
    (`build_model`) or need real weights leave the estimate at the task's plain model; one that asks which parameters
    the checkpoint lacks may train more of them. `exact` is False then, and `why` says so.

    Returns:
        `exact`, `why`, `parameters`, `trainable`, the sizes `*_bytes`, and `state`: the copies of the trained weights
        that each method keeps. Only `exact` where the model cannot be built.
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
    trial, why = _trial(run), ""
    if hooks.implementations("build_model"):
        why = "of the plain model; a method builds another"
    else:
        try:
            trial.slots = hooks.slots
            model = hooks.transform("transform_model", trial, model, expect=torch.nn.Module)
        except (NotImplementedError, RuntimeError, HybridEngineError):
            why = "of the plain model; a method needs its weights"
        if trial.missing_parameters.asked:
            why = why or "more where the checkpoint lacks a head"
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = {m.name: m.traits.state for m in methods if m.traits.state}
    return {
        "exact": not why,
        "why": why,
        "parameters": total,
        "trainable": trainable,
        "weights_bytes": 4 * total,
        "gradient_bytes": 4 * trainable,
        "state_bytes": round(4 * trainable * sum(state.values())),
        "state": state,
    }


def _trial(run: Run) -> Any:
    """The run as far as hooks change it: what they say or add on a model without weights is not this run's."""
    trial: Any = copy.copy(run)
    trial.notes, trial.modules, trial.static_modules, trial._state = [], {}, set(), {}
    trial.model_parts, trial.soft_tokens = set(), SoftTokens()
    trial.missing_parameters = _Unknown()
    return trial
