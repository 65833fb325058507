"""`best/`: the best model so far, in the format of transformers or PEFT wherever they can load it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from hybridengine.errors import OutputError
from hybridengine.model.loading import quiet
from hybridengine.plugin.calling import Hooks
from hybridengine.run import Run
from hybridengine.seams.context import Context
from hybridengine.stack.compose import evaluation
from hybridengine.train.adapters import (
    ADAPTER,
    TRAINED,
    adds_modules,
    complete_adapter,
    load_trained,
    save_trained,
)
from hybridengine.train.checkpoint import write_tensors
from hybridengine.train.files import damage, replace_folder

__all__ = ["load_best", "save_best"]


def save_best(run: Run, ctx: Context, hooks: Hooks, folder: Path) -> None:
    """Save model, tokenizer and run modules as evaluation sees them (averaged weights swapped in)."""
    with replace_folder(folder) as staging, evaluation(ctx, hooks), quiet():
        if adds_modules(hooks.methods):
            save_trained(run, staging)
        else:
            run.model.save_pretrained(staging)
        run.tokenizer.save_pretrained(staging)
        if (staging / ADAPTER).is_file():
            complete_adapter(run, staging)
        for name, module in run.modules.items():
            # Once more in a format of its own, for use without this package.
            if callable(save := getattr(module, "save_pretrained", None)):
                save(staging / name)
        modules = {
            f"{name}/{key}": value
            for name, module in run.modules.items()
            if name not in run.static_modules
            for key, value in module.state_dict().items()
        }
        if modules:
            write_tensors(staging / "run_modules.safetensors", modules)
        about = {"step": run.step, "labels": run.labels, "task": run.config.task_entry[0], "memory": run.memories}
        (staging / "hybridengine.json").write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")


def load_best(run: Run, folder: Path) -> None:
    """Put the weights of `best/` into the run's built model and its run modules.

    Raises:
        OutputError: the folder is damaged or holds another model.
    """
    if reason := damage(folder):
        raise OutputError(f"{folder}: {reason}; train again in another `output`")
    if (folder / TRAINED).is_file():
        load_trained(run, folder)
    elif (folder / ADAPTER).is_file():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(run.model, load_file(folder / "adapter_model.safetensors"))
    else:
        with quiet():
            stored = type(run.model).from_pretrained(folder, dtype=torch.float32)
        own, values = run.model.state_dict(), stored.state_dict()
        if own.keys() != values.keys():
            raise OutputError(f"{folder} holds another model ({sorted(own.keys() ^ values.keys())[0]} differs)")
        run.model.load_state_dict(values)
    modules = folder / "run_modules.safetensors"
    if modules.is_file():
        for name, value in load_file(modules).items():
            module, _, key = name.partition("/")
            if run.predicting and module not in run.modules:
                continue  # only training needs it
            with torch.no_grad():
                run.modules[module].state_dict(keep_vars=True)[key].copy_(value)
