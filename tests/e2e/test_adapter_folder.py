"""`best/` of a LoRA run: transformers, its pipelines and PEFT load it, and the code in its README runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import hybridengine
from hybridengine import Engine
from hybridengine.errors import ModelError
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_checkpoint
from hybridengine.train import adapters
from hybridengine_plugins.adapters.lora import LoRA

LABELS = ["bad", "fine", "good"]
CLASSIFIER = "AutoModelForSequenceClassification"


def trained(tmp_path: Path, architecture: str = "bert") -> Path:
    base = tiny_checkpoint(tmp_path / "base", architecture, auto_class=CLASSIFIER, num_labels=2)
    rows = [{"text": f"a {label} movie {i}", "label": label} for i in range(8) for label in LABELS]
    config = {
        "task": "text-classification",
        "model": {"name": str(base)},
        "data": {"train": rows, "validation": rows[:6]},
        "train": {"epochs": 1, "batch_size": 8, "lr": 0.05, "precision": "fp32"},  # as transformers will read it
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
    assert not info["missing_keys"]  # nothing is made up and warned about
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


def test_without_peft_no_scores_are_better_than_wrong_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    for module in (transformers.integrations.peft, transformers.models.auto.auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda: False)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "best")
    tokens = transformers.AutoTokenizer.from_pretrained(run / "best")("a good film", return_tensors="pt")
    assert model(**tokens).logits.isnan().all()


@pytest.mark.parametrize("reason", ["large", "little room"])
def test_where_a_base_does_not_fit_the_adapter_stands_alone(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "large":
        monkeypatch.setattr(adapters, "_LARGEST_BASE", 1000)
    else:
        full = SimpleNamespace(free=100_000)
        monkeypatch.setattr(adapters.shutil, "disk_usage", lambda _: full)
    run = trained(tmp_path)
    names = {path.name for path in (run / "best").iterdir()}
    assert not names & {"config.json", "model.safetensors"} and "adapter_model.safetensors" in names
    listed = json.loads((run / "best" / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert "README.md" in listed
    (note,) = (n for n in json.loads((run / "summary.json").read_text(encoding="utf-8"))["notes"] if "best/" in n)
    assert ("the base model has" if reason == "large" else "the disk has 0.0 GB left") in note
    loaded = card_code(run)
    agrees(loaded["model"], loaded["tokenizer"], run)


def test_saving_leaves_the_model_in_training_as_it_was(tmp_path: Path) -> None:
    batch = make_batch()
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    run = set_up([LoRA(r=2)], tiny_bert(**labels), batch, labels=LABELS).run
    for parameter in run.may_optimise.values():
        torch.nn.init.normal_(parameter, std=0.1)

    def seen() -> tuple[torch.Tensor, list[tuple[str, bool, int]]]:
        parameters = [(name, p.requires_grad, id(p)) for name, p in run.model.named_parameters()]
        return run.model.eval()(**batch.inputs).logits, parameters

    logits, parameters = seen()
    adapters.complete_adapter(run, tmp_path)
    assert torch.equal(seen()[0], logits) and seen()[1] == parameters
    assert (tmp_path / "model.safetensors").is_file()


def test_an_adapter_is_no_model_to_start_from(tmp_path: Path) -> None:
    run = trained(tmp_path)
    config = {
        "task": "text-classification",
        "model": {"name": str(run / "best")},
        "data": {"train": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 4, "carve": {}},
        "output": str(tmp_path / "second"),
    }
    with pytest.raises(ModelError, match=r"is an adapter, not a full model.*merge_and_unload.*`stages`"):
        Engine(config).train()
