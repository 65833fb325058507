"""`best/` of an adapted model: PEFT's folder completed, or what was trained alone; a card in both."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hybridengine.errors import OutputError
from hybridengine.plugin.stacking import Method
from hybridengine.run import Run
from hybridengine.train.checkpoint import write_tensors

__all__ = ["ADAPTER", "TRAINED", "adds_modules", "complete_adapter", "load_trained", "needs_base", "save_trained"]

ADAPTER = "adapter_config.json"
"""The file that makes a folder one of PEFT's."""

TRAINED = "trained.safetensors"
"""The file of a model with modules that its class lacks: the trained parameters alone."""

_LARGEST_BASE = 2 << 30
"""Bytes of base model up to which it stands beside its adapter; above, every improvement would cost minutes of disk."""


def needs_base(folder: Path) -> bool:
    """Whether `best/` is nothing without the base model, adapted anew by the methods."""
    return (folder / ADAPTER).is_file() or (folder / TRAINED).is_file()


def adds_modules(methods: Sequence[Method]) -> list[str]:
    """Those that put modules into the model which its class lacks, so that transformers could not load it."""
    return [method.name for method in methods if "added_modules" in method.provides]


def save_trained(run: Run, folder: Path) -> None:
    """Write what training changed or made up, and a card."""
    wanted = {*run.may_optimise, *run.missing_parameters}
    write_tensors(folder / TRAINED, {k: p for k, p in run.model.named_parameters() if k in wanted})
    start = _CARD_START.format(**_told(run, "hybridengine"))
    (folder / "README.md").write_text(start + _CARD_OF_TRAINED + _CARD_END, encoding="utf-8")


def load_trained(run: Run, folder: Path) -> None:
    """Put what `save_trained` wrote into the run's adapted model.

    Raises:
        OutputError: the model lacks a parameter of the folder, or has it in another shape.
    """
    own = dict(run.model.named_parameters())
    for name, value in load_file(folder / TRAINED).items():
        if name not in own or own[name].shape != value.shape:
            raise OutputError(f"{folder} belongs to another model or stack ({name} differs); use its own config")
        own[name].detach().copy_(value)


def complete_adapter(run: Run, folder: Path) -> None:
    """Add what transformers needs to load the adapter in `folder`, and a card in place of PEFT's empty one.

    Of a new head with labels, the base model that an adapter names tells neither size nor labels. Transformers takes a
    folder with `config.json` and weights for a whole model with an adapter in it, so those stand here too.
    """
    base: Any = run.model.get_base_model()
    labelled = bool(run.labels) and list((base.config.id2label or {}).values()) == run.labels
    heads = _new_heads(base) if labelled else []
    whole = bool(heads) and _has_room(run, base, folder)
    if whole:
        _save_base(run.model, heads, folder)
    start = _CARD_START.format(**_told(run, "peft"))
    load = _CARD_OF_WHOLE.format(kind=type(base).__name__) if whole else _card_of_adapter(run, base, labelled)
    (folder / "README.md").write_text(start + load + _CARD_END, encoding="utf-8")


def _told(run: Run, library: str) -> dict[str, str]:
    """What the start of a card says."""
    name, labels = run.config.model.name, f"\nLabels: {', '.join(run.labels)}.\n" if run.labels else ""
    told = {"name": name, "base": json.dumps(name, ensure_ascii=False), "library": library, "labels": labels}
    return {**told, "task": run.config.task_entry[0]}


def _has_room(run: Run, base: Any, folder: Path) -> bool:
    """Whether the base model can stand beside its adapter; the run tells why not."""
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    if not hasattr(run.model, "unload"):
        why = "PEFT cannot take this kind of adapter off its base model"
    elif size > _LARGEST_BASE:
        why = f"the base model has {size / 1e9:.1f} GB"
    elif 2 * size > (free := shutil.disk_usage(folder).free):  # as much again is left to the checkpoints
        why = f"the disk has {free / 1e9:.1f} GB left"
    else:
        return True
    run.say(f"best/ holds the adapter alone, because {why}; its README.md has the code that loads it with its base")
    return False


def _new_heads(base: Any) -> list[str]:
    from peft.utils import ModulesToSaveWrapper

    return [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]


def _save_base(model: Any, heads: list[str], folder: Path) -> None:
    """Save the base model with NaN for the heads, which the adapter brings.

    Without PEFT, transformers reads over the adapter and says nothing: no numbers are better than wrong ones.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}  # the copy is for its modules alone
    adapted = copy.deepcopy(model, shared)
    inside = adapted.get_base_model()
    for head in heads:  # PEFT's unload of (IA)3, OFT and others fails where a head is no single layer (a pooler)
        inside.set_submodule(head, inside.get_submodule(head).original_module)
    base = adapted.unload()
    state = {
        key: torch.full_like(value, torch.nan)
        if value.is_floating_point() and any(key.startswith(f"{head}.") for head in heads)
        else value
        for key, value in base.state_dict().items()
    }
    base.save_pretrained(folder, state_dict=state)


_CARD_START = """---
base_model: {base}
library_name: {library}
---

An adapter for `{name}`, trained with hybridengine for {task}.
{labels}"""

_CARD_OF_TRAINED = """
`trained.safetensors` holds the trained parameters by their names in the adapted model: the adapter's own modules, which
no class of transformers has, and the head. All others are the base model's.
"""

_CARD_OF_WHOLE = """
With transformers (5.4 or newer) **and PEFT**, FOLDER being this one; pipelines work too:

```python
from transformers import AutoTokenizer, {kind}

model = {kind}.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

`model.safetensors` is the base model; its head is NaN, for the trained one comes with the adapter. Without PEFT
transformers reads over the adapter, and all scores are NaN. `adapter_config.json` and `adapter_model.safetensors` are
all that `PeftModel` needs where the base model is at hand.
"""

_CARD_END = """
With hybridengine, RUN being the run folder that this one stands in: `hybridengine.load(RUN).predict([...])`. It needs
the base model at the path named above where that is a local folder.
"""


def _card_of_adapter(run: Run, base: Any, labelled: bool) -> str:
    name, kind, given = run.config.model.name, type(base).__name__, ""
    if labelled:
        given = f",\n    id2label={base.config.id2label!r},\n    label2id={base.config.label2id!r},\n"
        given += "    ignore_mismatched_sizes=True,  # the adapter brings the head\n"
    return f"""
It holds no full model: whoever loads it needs the base model, at this very path where it is a local folder. With
transformers and PEFT, FOLDER being this one:

```python
from peft import PeftModel
from transformers import AutoTokenizer, {kind}

base = {kind}.from_pretrained({"" if not given else chr(10) + "    "}{name!r}{given})
model = PeftModel.from_pretrained(base, FOLDER).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

`model.save_pretrained(ANOTHER)` then writes a full model.
"""
