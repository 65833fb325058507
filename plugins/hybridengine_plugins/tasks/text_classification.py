"""Classify texts or pairs of texts, with one label a row or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hybridengine import kernels
from hybridengine.data import label_id, label_name, label_options, label_order
from hybridengine.errors import DataError
from hybridengine.evaluate import ClassificationMetrics, check_metric
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Feature, Out, Prediction, RandomRows, Row, Term, View
from hybridengine.text import head_patterns, padded_inputs, set_pad_token, tokenise, usable_length

__all__ = ["TextClassification"]


@dataclass(eq=False)
class TextClassification:
    """Predict the label of a text, of a pair of texts, or, with `multi_label`, every label that applies.

    Roles: `text`, optionally `text_pair`, and `label` (a name or number; a list of them with `multi_label`).
    Encoders classify their first token, decoders the last token that is not padding; left and right padding give the
    same logits. The leaf loss is summed cross-entropy, or, with `multi_label`, binary cross-entropy summed over the
    classes; its unit is the row. Metrics: accuracy, precision, recall, F1, MCC, AUROC, ECE, confusion.

    Labels are numbered by name (by value where all are whole numbers), in the order of `data.labels` where that maps
    them, or as `labels` says.
    """

    traits: ClassVar[Traits] = Traits(kind="task", family="tasks")

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    columns: ClassVar[Mapping[str, str]] = {"text": "text", "text_pair": "text_pair", "label": "label"}
    optional_columns: ClassVar[Sequence[str]] = ("text_pair",)
    greater_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "rows"
    head: ClassVar[Sequence[str]] = head_patterns(
        "classifier", "pre_classifier", "score", "classification_head", "sequence_summary", "logits_proj"
    )

    multi_label: bool = parameter(False, "whether a row has a list of labels, each of which may apply or not")
    labels: list[str] = parameter(list, "label names in the order of their ids")
    distribution: str = field(default="softmax", init=False)
    metric: str = field(default="accuracy", init=False)
    metric_names: Sequence[str] = field(default=ClassificationMetrics.NAMES, init=False)
    _ids: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.multi_label:
            self.distribution = "bernoulli"
            self.metric, self.metric_names = "f1_micro", ClassificationMetrics.MULTI_LABEL_NAMES

    @hook
    def build_task(self, run: Run) -> TextClassification:
        """This object is the task."""
        return self

    def check_row(self, row: Row) -> str | None:
        """A label must be one value, or a list with `multi_label`; an unlabelled row is usable."""
        label = row.get("label")
        if label is None:
            return None
        many = isinstance(label, list | tuple)
        if many and not self.multi_label:
            return "label is a list; set `task: {text-classification: {multi_label: true}}` for several labels a row"
        if self.multi_label and not many:
            return f"label must be a list with multi_label, not {type(label).__name__}"
        if any(isinstance(value, float) and not value.is_integer() for value in (label if many else [label])):
            return f"label {label!r} is a number between classes; a classifier needs whole numbers or names"
        return None

    def prepare(self, run: Run, rows: Sequence[Row]) -> None:
        """Learn the label set of the training rows."""
        if run.config.evaluate.metric:
            check_metric(run.config.evaluate.metric, self.metric_names, "text-classification")
        names = {name for row in rows for name in self._names(row)}
        order = self.labels or list(dict.fromkeys(run.config.data.labels.values()))
        run.labels = label_order(names, order)
        if len(run.labels) < (1 if self.multi_label else 2):
            raise DataError(f"the training rows hold the labels {run.labels}; a classifier needs two classes")
        self._ids = {name: index for index, name in enumerate(run.labels)}

    def _names(self, row: Row) -> list[str]:
        label = row.get("label")
        if label is None:
            return []
        return [label_name(value) for value in (label if self.multi_label else [label])]

    def model_options(self, run: Run) -> dict[str, Any]:
        """Head size and label names."""
        kind = "multi_label_classification" if self.multi_label else "single_label_classification"
        return {**label_options(run.labels), "problem_type": kind}

    def configure(self, run: Run, model: nn.Module) -> nn.Module:
        """Agree on the padding token, by which decoders find a row's last token."""
        set_pad_token(run, model)
        return model

    def label_of(self, row: Row) -> int | list[int] | None:
        """A row's encoded label: an id, zeros and ones per class with `multi_label`, or None where it has none."""
        if row.get("label") is None:
            return None
        ids = {label_id(name, self._ids) for name in self._names(row)}
        return [int(i in ids) for i in range(len(self._ids))] if self.multi_label else ids.pop()

    def features(self, run: Run, rows: Sequence[Row]) -> list[Feature]:
        """Tokenise all rows, those with a second text as pairs."""
        features: list[Feature] = [{}] * len(rows)
        for paired in (False, True):
            chosen = [i for i, row in enumerate(rows) if (row.get("text_pair") is not None) == paired]
            pairs = [rows[i]["text_pair"] for i in chosen] if paired else None
            texts = [rows[i]["text"] for i in chosen]
            made, _ = tokenise(run.tokenizer, texts, pairs, max_length=usable_length(run))
            for index, feature in zip(chosen, made, strict=True):
                label = self.label_of(rows[index])
                features[index] = feature if label is None else {**feature, "label": label}
        return features

    def collate(self, run: Run, features: Sequence[Feature], rows: Sequence[int], random: RandomRows) -> Batch:
        """Pad to the longest; targets `[B]` ids or `[B, C]` zeros and ones, None unless every row is labelled."""
        # Encoders classify what stands first; padded on the left, that would be padding.
        first = features[0]["input_ids"][0]
        side = "right" if first == run.tokenizer.cls_token_id else run.tokenizer.padding_side
        inputs, masks = padded_inputs(run, features, side=side)
        labels = [feature.get("label") for feature in features]
        targets = None if None in labels else torch.tensor(labels, dtype=torch.long)
        counts = {"rows": len(features), "all_rows": len(features), "episodes": 1}
        return Batch(inputs, targets, tuple(rows), masks, counts)

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """Cross-entropy, or binary cross-entropy, summed over rows."""
        (out,) = ctx.outputs(batch, [view])
        return replace(out, terms=self.terms(out.logits, batch))

    def terms(
        self, logits: Tensor, batch: Batch, *, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> dict[str, Term]:
        """The loss from logits `[B, C]`.

        Args:
            weight: `[C]`, a factor for each class.
            label_smoothing: share of the label that is spread over all classes (over yes and no with `multi_label`).

        Raises:
            DataError: if the batch is not labelled.
        """
        if batch.targets is None:
            raise DataError("these rows have no label, so they have no loss")
        if not self.multi_label:
            options = {"weight": weight, "label_smoothing": label_smoothing}
            return {"loss": (kernels.cross_entropy(logits, batch.targets, reduction="sum", **options), "rows")}
        wide = logits if logits.dtype == torch.float64 else logits.float()
        target = batch.targets.to(wide.dtype) * (1 - label_smoothing) + label_smoothing / 2
        loss = functional.binary_cross_entropy_with_logits(wide, target, weight=weight, reduction="sum")
        return {"loss": (loss, "rows")}

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Probabilities `[B, C]`: a softmax, or a sigmoid with `multi_label`; the loss where rows are labelled."""
        with torch.no_grad():
            (out,) = ctx.outputs(batch, [view])
            scores = out.scores.sigmoid() if self.multi_label else out.scores.softmax(-1)
            return Prediction(scores, terms={} if batch.targets is None else self.terms(out.scores, batch))

    def metrics(self, run: Run) -> ClassificationMetrics:
        """Fresh metrics."""
        main = run.config.evaluate.metric or self.metric
        return ClassificationMetrics(run.labels, main, multi_label=self.multi_label)

    def records(self, run: Run, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Texts, label, prediction, probabilities by label, and whether the prediction is correct."""
        if prediction.scores is None:
            return
        # Targets, not the rows' own labels: episodes relabel their classes.
        targets = [None] * len(rows) if batch.targets is None else batch.targets.tolist()
        for row, scores, target in zip(rows, prediction.scores.tolist(), targets, strict=True):
            names: Any = None
            if self.multi_label:
                guess: Any = [label for label, score in zip(run.labels, scores, strict=True) if score >= 0.5]
                names = [label for label, on in zip(run.labels, target or (), strict=False) if on]
            else:
                guess = run.labels[max(range(len(scores)), key=scores.__getitem__)]
                names = None if target is None else run.labels[target]
            record = {role: row[role] for role in ("text", "text_pair") if row.get(role) is not None}
            if target is not None:
                record.update(label=names, correct=names == guess)
            probabilities = {label: round(score, 6) for label, score in zip(run.labels, scores, strict=True)}
            yield {**record, "prediction": guess, "probabilities": probabilities}
