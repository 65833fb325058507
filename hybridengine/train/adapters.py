"""What stands in `best/` beside an adapter: a base model for its head where transformers needs one, and a card."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from hybridengine.run import Run

__all__ = ["ADAPTER", "complete_adapter"]

ADAPTER = "adapter_config.json"
"""The file that makes a folder one of PEFT's."""

_LARGEST_BASE = 2 << 30
"""Bytes of base model up to which it stands beside its adapter; above, every improvement would cost minutes of disk."""


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
    name = run.config.model.name
    start = _CARD_START.format(base=json.dumps(name, ensure_ascii=False), name=name, task=run.config.task_entry[0])
    labels = f"\nLabels: {', '.join(run.labels)}.\n" if run.labels else ""
    load = _CARD_OF_WHOLE.format(kind=type(base).__name__) if whole else _card_of_adapter(base, name, labelled)
    (folder / "README.md").write_text(start + labels + load + _CARD_END, encoding="utf-8")


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
library_name: peft
---

An adapter for `{name}`, trained with hybridengine for {task}.
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


def _card_of_adapter(base: Any, name: str, labelled: bool) -> str:
    kind, given = type(base).__name__, ""
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
