"""What stands in `best/` beside an adapter: its base model where that is small, and how to load both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hybridengine.run import Run

__all__ = ["ADAPTER", "complete_adapter"]

ADAPTER = "adapter_config.json"
"""The file that makes a folder one of PEFT's."""

_LARGEST_BASE = 2 << 30
"""Bytes of base model up to which it stands beside its adapter; above, every improvement would cost minutes of disk."""


def complete_adapter(run: Run, folder: Path) -> None:
    """Add the base model with its configuration, and how to load both, in place of PEFT's empty model card.

    Transformers takes a folder with `config.json` for a whole model with an adapter in it; of an adapter alone, its
    pipelines know neither the labels nor the size of the head.
    """
    model: Any = run.model
    base, name, kind = model.get_base_model(), run.config.model.name, type(model.get_base_model()).__name__
    whole = sum(p.numel() * p.element_size() for p in base.parameters()) <= _LARGEST_BASE
    if whole:
        copy.deepcopy(model).unload().save_pretrained(folder)
    head = f"""---
base_model: {json.dumps(name, ensure_ascii=False)}
library_name: peft
---

An adapter for `{name}`, trained with hybridengine for {run.config.task_entry[0]}.
"""
    labels = f"\nLabels: {', '.join(run.labels)}.\n" if run.labels else ""
    card = head + labels + (_CARD_OF_WHOLE.format(kind=kind) if whole else _card_of_adapter(run, base, name, kind))
    (folder / "README.md").write_text(card, encoding="utf-8")


_CARD_OF_WHOLE = """
`adapter_model.safetensors` is the adapter, `model.safetensors` the base model with the trained head. FOLDER being this
one, transformers loads both (PEFT must be installed), and so do its pipelines:

```python
from transformers import AutoTokenizer, {kind}

model = {kind}.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Where the base model is at hand, `adapter_model.safetensors` and `adapter_config.json` are all that `PeftModel` needs.
With hybridengine, RUN being the run folder that this one stands in: `hybridengine.load(RUN).predict([...])`.
"""


def _card_of_adapter(run: Run, base: Any, name: str, kind: str) -> str:
    given = ""
    if run.labels and list((base.config.id2label or {}).values()) == run.labels:
        given = f",\n    id2label={base.config.id2label!r},\n    label2id={base.config.label2id!r},\n"
        given += "    ignore_mismatched_sizes=True,  # the adapter brings the head\n"
    return f"""
It holds no full model, for that is large: whoever loads it needs the base model, at this very path where it is a local
folder. With transformers and PEFT, FOLDER being this one:

```python
from peft import PeftModel
from transformers import AutoTokenizer, {kind}

base = {kind}.from_pretrained({"" if not given else chr(10) + "    "}{name!r}{given})
model = PeftModel.from_pretrained(base, FOLDER).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

`model.save_pretrained(ANOTHER)` then writes a full model. With hybridengine, RUN being the run folder that this one
stands in: `hybridengine.load(RUN).predict([...])`.
"""
