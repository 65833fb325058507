"""Wrapping a model by PEFT: which layers are adapted, which modules are trained in full, and a seeded start."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hybridengine.errors import ModelError
from hybridengine.model.loading import quiet
from hybridengine.run import Run
from hybridengine.seams import mix, seeded

__all__ = ["freeze_pretrained", "linear_targets", "named", "new_heads", "task_type", "transposed", "wrap_by_peft"]

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def wrap_by_peft(run: Run, model: nn.Module, name: str, config: Any) -> nn.Module:
    """The model adapted as a PEFT config says; the adapters' random start depends on seed and `name` alone."""
    from peft import get_peft_model

    with quiet(), seeded(torch.default_generator, mix(run.seed, name)):  # PEFT draws from it
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what this model does; None where it has none."""
    return next((kind for end, kind in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None)


def new_heads(run: Run, model: Any, wanted: Sequence[str] | None = None) -> list[str]:
    """The wanted modules, else the topmost that are all new: the task's head, and what the checkpoint lacks (a pooler).

    A pretrained language-model head is not among them: it is good as it is, and often tied to the embeddings.
    """
    if wanted is not None:
        return list(wanted)
    output = _output_layer(model)
    new = set(run.missing_parameters)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = [f"{name}.{key}" for key, _ in module.named_parameters()]
        covered = any(name.startswith(f"{above}.") for above in found)
        pretrained_output = output in module.modules() and not new.issuperset(inside)
        if name and inside and not covered and not pretrained_output:
            if all(key in new or any(fnmatch.fnmatchcase(key, p) for p in run.task.head) for key in inside):
                found.append(name)
    return found


def freeze_pretrained(run: Run, model: nn.Module) -> nn.Module:
    """The model with all frozen but what the checkpoint lacks and the task's head.

    Unless a method of the stack takes the slot `backbone` (`lora`, `bitfit`, `full`): then that says what is trained.
    """
    if "backbone" in run.slots:
        return model
    heads = new_heads(run, model)
    model.requires_grad_(False)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    return model


def linear_targets(
    model: Any, heads: Sequence[str], wanted: Sequence[str] | None, choices: str, method: str
) -> list[str]:
    """Names or name endings of the layers to adapt: the wanted ones, PEFT's choice, or all linear layers below a head.

    Args:
        heads: modules that are trained in full, whose layers are not adapted.
        wanted: name endings that the user gave.
        choices: name of PEFT's table of layers by model type.
        method: for messages.

    Raises:
        ModelError: an ending names no linear layer, or there is none to adapt.
    """
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    for ending in wanted or ():
        if not named(linear, ending):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ModelError(f"{method}: no layer of this model is named {ending!r}; its linear layers are: {known}")
    chosen = list(wanted or _peft_choice(model, choices))
    if any(named(linear, ending) for ending in chosen):
        return chosen
    output = _output_layer(model)
    above = [name for name in linear if any(name == head or name.startswith(f"{head}.") for head in heads)]
    chosen = [n for n in linear if n not in above and model.get_submodule(n) is not output]
    if not chosen:
        raise ModelError(f"{method}: this model has no linear layer to adapt; remove `{method}`")
    return chosen


def named(modules: Sequence[str], ending: str) -> list[str]:
    """The modules that a name ending of PEFT's stands for."""
    return [name for name in modules if name == ending or name.endswith(f".{ending}")]


def transposed(model: nn.Module, targets: Sequence[str]) -> bool:
    """Whether the targets store their weights the other way round, as GPT2's Conv1D does."""
    return any(
        type(module).__name__ == "Conv1D" and any(named([name], ending) for ending in targets)
        for name, module in model.named_modules()
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _output_layer(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _peft_choice(model: Any, table: str) -> list[str]:
    import peft.utils

    choice = getattr(peft.utils, table).get(getattr(getattr(model, "config", None), "model_type", ""), [])
    return [] if isinstance(choice, str) else list(choice)
