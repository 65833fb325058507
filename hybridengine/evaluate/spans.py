"""Spans in tag sequences (BIO, also IOBES), and metrics over whole spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hybridengine.data.labels import label_name
from hybridengine.evaluate.classification import from_counts
from hybridengine.evaluate.metrics import Array, LossMean, RowTable, check_metric
from hybridengine.seams.task import Row
from hybridengine.seams.types import Batch, Prediction

__all__ = ["SpanMetrics", "spans", "word_tags"]

_RATES = ("f1", "precision", "recall")


def spans(tags: Iterable[str]) -> set[tuple[str, int, int]]:
    """All spans as `(type, first word, last word)`, read as conlleval does.

    `I-X` after anything but a span of type X starts a span; `E-X` and `S-X` also end one.
    """
    found = set()
    start, kind = -1, ""  # start -1: no open span
    index = -1
    for index, tag in enumerate(tags):
        prefix, _, name = tag.partition("-")
        goes_on = prefix in ("I", "E") and start >= 0 and name == kind
        if start >= 0 and not goes_on:
            found.add((kind, start, index - 1))
            start = -1
        if prefix != "O" and not goes_on:
            start, kind = index, name
        if prefix in ("E", "S"):
            found.add((kind, start, index))
            start = -1
    if start >= 0:
        found.add((kind, start, index))
    return found


def word_tags(ids: Tensor, scored: Tensor, labels: Sequence[str], lengths: Sequence[int]) -> list[list[str]]:
    """Tags of the words of each row: the k-th scored position is the k-th word; words cut off are `O`.

    Args:
        ids: label ids per position `[B, L]`.
        scored: 1 at the first piece of each word `[B, L]`.
        lengths: words of each row.
    """
    out = []
    for row, mask, length in zip(ids.tolist(), scored.tolist(), lengths, strict=True):
        known = [labels[tag] for tag, on in zip(row, mask, strict=True) if on][:length]
        out.append(known + ["O"] * (length - len(known)))
    return out


class SpanMetrics:
    """Precision, recall and F1 over whole spans (micro), per type, and the accuracy of single tags.

    True tags are read from the rows, so that a span lost to truncation counts as missed.
    """

    NAMES = (*_RATES, "accuracy", "loss")

    def __init__(self, labels: Sequence[str], main: str = "f1") -> None:
        self.main = check_metric(main, self.NAMES, "token-classification")
        self.labels = list(labels)
        self._loss = LossMean()
        self._rows = RowTable()
        self._hits: Counter[str] = Counter()
        self._predicted: Counter[str] = Counter()
        self._actual: Counter[str] = Counter()

    def update(self, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> None:
        """Take in one batch; its rows must be tagged."""
        if prediction.scores is None:
            raise ValueError("span metrics need scores per token")
        self._loss.update(batch, prediction)
        lengths = [len(row["tags"]) for row in rows]
        guesses = word_tags(prediction.scores.argmax(-1), batch.masks["scored"]["input_ids"], self.labels, lengths)
        losses = prediction.per_row["loss"].tolist() if "loss" in prediction.per_row else [0.0] * len(rows)
        numbers = []
        for guess, row, loss in zip(guesses, rows, losses, strict=True):
            truth = [label_name(tag) for tag in row["tags"]]
            right = sum(a == b for a, b in zip(guess, truth, strict=True))
            numbers.append([*self._count(spans(guess), spans(truth)), right, len(truth), loss])
        self._rows.add(batch.rows, np.asarray(numbers, dtype=np.float64))

    def _count(self, guess: set[tuple[str, int, int]], truth: set[tuple[str, int, int]]) -> tuple[int, int, int]:
        self._hits.update(kind for kind, _, _ in guess & truth)
        self._predicted.update(kind for kind, _, _ in guess)
        self._actual.update(kind for kind, _, _ in truth)
        return len(guess & truth), len(guess), len(truth)

    def compute(self) -> dict[str, Any]:
        """`f1`, `precision`, `recall` of spans, `accuracy` of tags, `loss`, `rows`, and `per_class` by span type."""
        if not len(self._rows):
            return {"rows": 0}
        hits, predicted, actual, right, words, _ = self._rows.table().sum(0)
        rates = {k: float(from_counts(f"{k}_micro", *_columns(hits, predicted, actual))) for k in _RATES}
        out: dict[str, Any] = {**rates, "accuracy": float(right / words), **self._loss.compute()}
        return {**out, "rows": len(self._rows), "words": int(words), "per_class": self._per_class()}

    def _per_class(self) -> dict[str, dict[str, Any]]:
        table = {}
        for kind in sorted(self._predicted | self._actual):
            counts = _columns(self._hits[kind], self._predicted[kind], self._actual[kind])
            rates = {k: float(from_counts(f"{k}_micro", *counts)) for k in _RATES}
            table[kind] = {**rates, "support": self._actual[kind], "predicted": self._predicted[kind]}
        return table

    def row_scores(self) -> Array:
        """Per row: span hits, predictions and truths `[n, 3]`; right and all tags `[n, 2]` for accuracy."""
        columns = {"accuracy": [3, 4], "loss": [5, 4]}
        return self._rows.table()[:, columns.get(self.main, [0, 1, 2])]

    def statistic(self) -> Callable[[Array], Array]:
        """From means of `row_scores` to the main metric."""
        if self.main in ("accuracy", "loss"):
            return lambda means: np.asarray(means[:, 0] / means[:, 1])
        return lambda means: from_counts(f"{self.main}_micro", *np.split(means, 3, axis=1))


def _columns(*numbers: float) -> tuple[Array, Array, Array]:
    hits, predicted, actual = (np.asarray([number], dtype=np.float64) for number in numbers)
    return hits, predicted, actual
