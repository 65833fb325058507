"""A bench whose model, rows and batches come from a template, as the engine builds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from hybridengine import load
from hybridengine.plugin import Run, Split
from hybridengine.predictor import Predictor
from hybridengine.seams import Batch, Prediction, View
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_checkpoint
from hybridengine_plugins.prompts.template import Template
from hybridengine_plugins.tasks.text_classification import TextClassification

VERBALIZER = {"bad": "terrible", "good": "great", "mixed": "fine"}
ROWS = [
    {"text": "a good movie", "label": "good"},
    {"text": "the plot was not very good and the actor was awful", "label": "bad"},
    {"text": "fine", "label": "mixed"},
    {"text": "yes i enjoy [MASK] it", "label": "good"},
]
MORE_ROWS = [
    *ROWS,
    {"text": "the story was boring and the price was poor", "label": "bad"},
    {"text": "not good and not bad", "label": "mixed"},
    {"text": "an excellent book", "label": "good"},
    {"text": "awful food and terrible service", "label": "bad"},
    {"text": "it was fine maybe", "label": "mixed"},
    {"text": "we love this place", "label": "good"},
]


def checkpoints(root: Path) -> dict[str, Path]:
    """Tiny models of each kind."""
    return {
        "bert": tiny_checkpoint(root / "bert", "bert", "AutoModelForMaskedLM"),
        "dropout": tiny_checkpoint(
            root / "dropout",
            "bert",
            "AutoModelForMaskedLM",
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        ),
        "headless": tiny_checkpoint(root / "headless", "bert", "AutoModel"),
        "gpt2": tiny_checkpoint(root / "gpt2", "gpt2"),
        "llama": tiny_checkpoint(root / "llama", "llama"),
        "t5": tiny_checkpoint(root / "t5", "t5"),
    }


class Ready:
    """A bench with a template and other methods; `batch` holds all `rows`."""

    def __init__(
        self,
        template: Template,
        folder: Path,
        *others: object,
        rows: Sequence[dict[str, Any]] = ROWS,
        unlabelled: Sequence[dict[str, Any]] = (),
        max_length: int = 64,
        side: str = "right",
        fp64: bool = True,
        **options: Any,
    ) -> None:
        self.task = TextClassification()
        self.rows = rows
        memories = options.pop("memories", {})

        def prepare(run: Run) -> None:
            run.config.model.name = str(folder)
            run.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
            run.splits = {"train": Split("train", rows)}
            if unlabelled:
                run.splits["unlabelled"] = Split("unlabelled", unlabelled)
            self.task.prepare(run, rows)
            run.memories = memories

        run = set_up([], tiny_bert(num_labels=3), make_batch(), task=self.task, prepare=prepare).run
        run.config.train.max_length = max_length
        run.model = self.task.configure(run, template.build_model(run))
        self.base = run.model.double() if fp64 else run.model
        first = self.task.collate(run, template.build_features(run, rows), range(len(rows)), run.random)

        def again(new: Run) -> None:
            prepare(new)
            new.tokenizer, new.cloze = run.tokenizer, run.cloze

        options = {"task": self.task, "prepare": again, "labels": run.labels, "max_length": max_length, **options}
        self.bench = set_up([template, *others], self.base, first, **options)
        self.run = self.bench.run
        self.run.labels = run.labels
        self.features = self.run.finish_features(self.bench.hooks.build("build_features", self.run, rows))
        self.batch = self.collate(range(len(rows)))

    def collate(self, chosen: Iterable[int]) -> Batch:
        """Some of the rows."""
        chosen = list(chosen)
        ids = self.run.splits["train"].ids(chosen)
        return self.task.collate(self.run, [self.features[i] for i in chosen], ids, self.run.random)

    def transformed(self, batch: Batch | None = None) -> Batch:
        """A batch as the training loop changes it."""
        return self.bench.hooks.transform("transform_batch", self.run, batch or self.batch)

    def logits(self, batch: Batch | None = None) -> Tensor:
        """Class logits without dropout."""
        self.run.model.eval()
        with torch.no_grad():
            return self.bench.ctx.outputs(batch or self.batch, [View()])[0].logits

    def predict(self, batch: Batch | None = None) -> Prediction:
        """Through the predict seam."""
        with self.bench.evaluation():
            return self.bench.ctx.predict(self.bench.ctx, batch or self.batch, View(key=0))


def run_config(folder: Path, methods: Sequence[Any], output: Path, **train: Any) -> dict[str, Any]:
    """A run of two steps on the rows above."""
    return {
        "task": "text-classification",
        "model": {"name": str(folder)},
        "data": {"train": MORE_ROWS, "validation": ROWS, "carve": {}},
        "train": {"max_steps": 2, "batch_size": 4, "max_length": 48, "device": "cpu", "precision": "fp32", **train},
        "evaluate": {"resamples": 20},
        "log": {"every": 1},
        "methods": list(methods),
        "output": str(output),
    }


def loaded_as_it_said(folder: Path) -> Predictor:
    """The finished run, loaded anew: it gives each validation row the probabilities that it wrote down."""
    model = load(folder)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    said = {line["text"]: line["probabilities"] for line in lines}
    for row, made in zip(ROWS, model.predict([row["text"] for row in ROWS]), strict=True):
        # written with six digits; other company in the batch moves an fp32 logit by some 1e-6
        assert made["probabilities"] == pytest.approx(said[row["text"]], abs=5e-6)
    return model
