"""A toy model, task and data on which the plan runs the real onion before the user's model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine import kernels
from hybridengine.config import Config
from hybridengine.data.rows import Split
from hybridengine.run import Run
from hybridengine.seams.context import Context
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.seams.randomness import seeded
from hybridengine.seams.sites import Sites
from hybridengine.seams.task import Feature, RandomRows
from hybridengine.seams.types import Batch, Out, Prediction, Term, View

__all__ = ["UNLABELLED", "ToyModel", "ToyTask", "toy_run"]

UNLABELLED = ("unlabelled", "augmented")
"""Splits whose rows come beside the training rows: without labels, and the same rows rewritten."""

_LENGTH, _VOCABULARY, _WIDTH = 5, 64, 8


class ToyBackbone(nn.Module):
    """Embedding and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """`[B, L]` ids to `[B, L, D]` states."""
        return SimpleNamespace(last_hidden_state=self.dropout(torch.tanh(self.embedding(input_ids))))


class ToyModel(nn.Module):
    """Embedding, dropout, mean, linear head: enough for every seam, small enough to cost nothing."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.base_model = ToyBackbone()
        self.classifier = nn.Linear(_WIDTH, classes)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> SimpleNamespace:
        """`[B, L]` ids to `[B, C]` logits; every position attends to all alike."""
        hidden = self.base_model(input_ids).last_hidden_state
        length = input_ids.shape[1]
        even = hidden.new_full((len(hidden), 1, length, length), 1 / length)
        logits = self.classifier(hidden.mean(1))
        return SimpleNamespace(logits=logits, hidden_states=(hidden, hidden), attentions=(even,))


class ToyTask:
    """Classification of the toy rows."""

    auto_class = "ToyModel"
    columns: Mapping[str, str] = {"text": "text", "label": "label"}
    optional_columns: Sequence[str] = ()
    metric = "accuracy"
    greater_is_better = True
    unit = "rows"
    head: Sequence[str] = ("classifier*",)

    def collate(self, run: Run, features: Sequence[Feature], rows: Sequence[int], random: RandomRows) -> Batch:
        """Batch of fixed length."""
        ids = torch.tensor([f["input_ids"] for f in features])
        mask = torch.ones_like(ids)
        masks = {kind: {"input_ids": mask} for kind in ("attention", "perturbable")}
        counts = {unit: len(rows) for unit in ("rows", "tokens", "all_rows")} | {"episodes": 1}
        targets = torch.tensor([f["label"] for f in features])
        return Batch({"input_ids": ids, "attention_mask": mask}, targets, tuple(rows), masks, counts)

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """Summed cross-entropy."""
        out = ctx.outputs(batch, [view])[0]
        return replace(out, terms=self.terms(out.scores, batch))

    def terms(self, logits: Tensor, batch: Batch, **options: Any) -> dict[str, Term]:
        """Cross-entropy over rows."""
        return {"loss": (kernels.cross_entropy(logits, batch.targets, reduction="sum", **options), "rows")}

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Softmax probabilities."""
        return Prediction(ctx.outputs(batch, [view])[0].scores.softmax(-1))


def toy_run(config: Config, classes: int, per_class: int) -> tuple[Run, dict[str, list[Feature]]]:
    """A dry run over `classes * per_class` toy rows, with its features by split."""
    run = Run(config, torch.device("cpu"), Precision("fp32", None), LossScale())
    run.dry = True
    with seeded(torch.default_generator, 0):
        run.model = run.forward_model = ToyModel(classes)
    run.task = ToyTask()
    run.labels = [f"class {i}" for i in range(classes)]
    rows = [{"text": f"row {i}", "label": run.labels[i % classes]} for i in range(classes * per_class)]
    run.splits = {name: Split(name, rows, "toy") for name in ("train", "validation", *UNLABELLED)}
    made = [
        {"input_ids": [(7 * i + j) % 50 + 3 for j in range(_LENGTH)], "label": i % classes, "length": _LENGTH}
        for i in range(len(rows))
    ]
    features: dict[str, list[Feature]] = {name: made for name in run.splits}
    ids = torch.zeros(2, _LENGTH, dtype=torch.long)
    run.probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    run.sites = Sites(run.model, run.probe)
    run.lazy_head = run.model.classifier  # so that the trace sees who reads logits
    run.load_model = lambda name: run.copy_of_model()
    return run, features
