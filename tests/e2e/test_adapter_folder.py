"""`best/` of a LoRA run: transformers, its pipelines and PEFT load it, and the code in its README runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import hybridengine
from hybridengine import Engine
from hybridengine.errors import ModelError
from hybridengine.testing import tiny_checkpoint
from hybridengine.train import adapters

LABELS = ["bad", "fine", "good"]
CLASSIFIER = "AutoModelForSequenceClassification"


def trained(tmp_path: Path, architecture: str = "bert") -> Path:
    base = tiny_checkpoint(tmp_path / "base", architecture, auto_class=CLASSIFIER, num_labels=2)
    rows = [{"text": f"a {label} movie {i}", "label": label} for i in range(8) for label in LABELS]
    config = {
        "task": "text-classification",
        "model": {"name": str(base)},
        "data": {"train": rows, "validation": rows[:6]},
        "train": {"epochs": 1, "batch_size": 8, "lr": 0.05},
        "methods": [{"lora": {"r": 2}}, "ema"],
        "output": str(tmp_path / "run"),
    }
    Engine(config).train()
    return tmp_path / "run"


def probabilities(run: Path, text: str) -> dict[str, float]:
    (record,) = hybridengine.load(run).predict(text)
    found: dict[str, float] = record["probabilities"]
    return found


def card_code(run: Path) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", (run / "best" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"FOLDER": str(run / "best")}
    exec(code, names)
    return names


def agrees(model: Any, tokenizer: Any, run: Path) -> None:
    text = "a good film"
    with torch.no_grad():
        scores = model.eval()(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].tolist()
    found = {model.config.id2label[i]: score for i, score in enumerate(scores)}
    assert found == pytest.approx(probabilities(run, text), abs=2e-6)  # records are rounded to six places


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_one_line_of_transformers_loads_adapter_head_and_labels(tmp_path: Path, architecture: str) -> None:
    run = trained(tmp_path, architecture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "best")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "best", output_loading_info=True
    )
    assert not info["missing_keys"]  # the trained head stands in the base too, so nothing is made up and told about
    agrees(model, tokenizer, run)
    classify = transformers.pipeline("text-classification", model=str(run / "best"), top_k=None)
    (found,) = classify(["a good film"])
    told = {entry["label"]: entry["score"] for entry in found}
    assert told == pytest.approx(probabilities(run, "a good film"), abs=2e-6)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    base.config.id2label = model.config.id2label
    agrees(PeftModel.from_pretrained(base, run / "best").merge_and_unload(), tokenizer, run)
    names = card_code(run)
    agrees(names["model"], names["tokenizer"], run)


def test_the_adapter_of_a_large_base_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_LARGEST_BASE", 1000)
    run = trained(tmp_path)
    names = {path.name for path in (run / "best").iterdir()}
    assert not names & {"config.json", "model.safetensors"} and "adapter_model.safetensors" in names
    listed = json.loads((run / "best" / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert "README.md" in listed
    loaded = card_code(run)
    agrees(loaded["model"], loaded["tokenizer"], run)


def test_an_adapter_is_no_model_to_start_from(tmp_path: Path) -> None:
    run = trained(tmp_path)
    config = {
        "task": "text-classification",
        "model": {"name": str(run / "best")},
        "data": {"train": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 4, "carve": {}},
        "output": str(tmp_path / "second"),
    }
    with pytest.raises(ModelError, match=r"this is an adapter.*merge_and_unload.*`stages`"):
        Engine(config).train()
