"""Metrics of classifiers, single-label and multi-label, streaming through torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridengine.evaluate.metrics import Array, LossMean, RowTable, check_metric
from hybridengine.seams.task import Row
from hybridengine.seams.types import Batch, Prediction

__all__ = ["ClassificationMetrics", "auroc_rows", "from_counts"]

_RATES = tuple(f"{kind}_{average}" for kind in ("f1", "precision", "recall") for average in ("macro", "micro"))
_BINS = 15


def from_counts(name: str, hits: Array, predicted: Array, actual: Array) -> Array:
    """A metric of class counts or shares `[..., C]`: `accuracy`, `mcc`, or `{f1,precision,recall}_{macro,micro}`.

    A class that is never predicted has precision 0; one that is neither predicted nor present is left out of macro
    averages, as in scikit-learn. MCC is Gorodkin's multi-class form and takes shares of the rows.

    Args:
        hits: rows of a class predicted as such.
        predicted: rows predicted as a class.
        actual: rows of a class.
    """
    if name == "mcc":
        cross = hits.sum(-1) - (predicted * actual).sum(-1)
        spread = (1 - (predicted**2).sum(-1)) * (1 - (actual**2).sum(-1))
        return _ratio(cross, np.sqrt(np.maximum(spread, 0)), spread > 1e-15)
    kind, _, average = name.rpartition("_")
    if average == "micro":
        hits, predicted, actual = (x.sum(-1, keepdims=True) for x in (hits, predicted, actual))
    rate = _rate(kind, hits, predicted, actual)
    present = predicted + actual > 0
    return np.asarray((rate * present).sum(-1) / np.maximum(present.sum(-1), 1))


def _rate(kind: str, hits: Array, predicted: Array, actual: Array) -> Array:
    parts = {"precision": (hits, predicted), "recall": (hits, actual), "f1": (2 * hits, predicted + actual)}
    top, bottom = parts[kind]
    return _ratio(top, bottom, bottom > 0)


def _ratio(top: Array, bottom: Array, defined: Any) -> Array:
    out: Array = np.divide(top, bottom, out=np.zeros(np.shape(top)), where=defined)
    return out


class ClassificationMetrics:
    """Accuracy, precision, recall, F1 (micro, macro, per class), MCC, AUROC, ECE, confusion matrix and loss.

    Scores are `[B, C]` probabilities. With `multi_label`, targets are `[B, C]` zeros and ones, a label is predicted at
    0.5 or more, accuracy is that of whole rows, ECE is taken over all single decisions.
    """

    NAMES = ("accuracy", *_RATES, "mcc", "auroc", "ece", "loss")
    MULTI_LABEL_NAMES = ("accuracy", *_RATES, "auroc", "ece", "loss")

    def __init__(self, labels: Sequence[str], main: str = "accuracy", *, multi_label: bool = False) -> None:
        from torchmetrics import classification

        names = self.MULTI_LABEL_NAMES if multi_label else self.NAMES
        self.main = check_metric(main, names, "text-classification")
        self.labels = list(labels)
        self.multi_label = multi_label
        self._loss = LossMean()
        self._rows = RowTable()
        self._correct = 0
        kind = "Multilabel" if multi_label else "Multiclass"
        size: dict[str, Any] = {
            "num_labels" if multi_label else "num_classes": len(self.labels),
            "validate_args": False,
        }
        self._confusion = getattr(classification, f"{kind}ConfusionMatrix")(**size)
        self._auroc = getattr(classification, f"{kind}AUROC")(average=None, **size)
        self._ece = (
            classification.BinaryCalibrationError(n_bins=_BINS, validate_args=False)
            if multi_label
            else classification.MulticlassCalibrationError(n_bins=_BINS, **size)
        )

    def update(self, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> None:
        """Take in one batch; it must be labelled."""
        if prediction.scores is None or batch.targets is None:
            raise ValueError("classification metrics need scores and labels")
        scores, targets = prediction.scores.detach().float().cpu(), batch.targets.detach().long().cpu()
        self._loss.update(batch, prediction)
        self._confusion.update(scores, targets)
        self._auroc.update(scores, targets)
        self._ece.update(*((scores.flatten(), targets.flatten()) if self.multi_label else (scores, targets)))
        predicted = (scores >= 0.5).long() if self.multi_label else scores.argmax(-1)
        correct = (predicted == targets).all(-1) if self.multi_label else predicted == targets
        self._correct += int(correct.sum())
        self._rows.add(batch.rows, self._row_numbers(scores, targets, predicted, correct))

    def _row_numbers(self, scores: Tensor, targets: Tensor, predicted: Tensor, correct: Tensor) -> Array:
        """What the main metric needs of each row."""
        if self.main == "accuracy":
            return np.asarray(correct, dtype=np.float64)
        if self.main == "loss":
            return _row_loss(scores, targets, self.multi_label)
        if self.main == "ece":
            return _bin_gaps(scores, targets, predicted, self.multi_label)
        truth = targets if self.multi_label else torch.nn.functional.one_hot(targets, len(self.labels))
        if self.main == "auroc":
            return np.asarray(torch.cat([scores, truth], dim=1), dtype=np.float64)
        guess = predicted if self.multi_label else torch.nn.functional.one_hot(predicted, len(self.labels))
        return np.asarray(torch.cat([guess * truth, guess, truth], dim=1), dtype=np.float64)

    def compute(self) -> dict[str, Any]:
        """Scalars by name (None where undefined), `per_class`, and `confusion` for single-label tasks."""
        if not len(self._rows):
            return {"rows": 0}
        matrix = self._confusion.compute().numpy().astype(np.float64)
        hits, predicted, actual = self._class_counts(matrix)
        rows = len(self._rows)
        out: dict[str, Any] = {"accuracy": self._correct / rows, "rows": rows}
        for name in (*_RATES, *(() if self.multi_label else ("mcc",))):
            out[name] = float(from_counts(name, hits / rows, predicted / rows, actual / rows))
        areas = self._areas(actual, rows)
        defined = [area for area in areas if area is not None]
        out["auroc"] = sum(defined) / len(defined) if defined else None
        out["ece"] = float(self._ece.compute())
        out.update(self._loss.compute())
        out["per_class"] = self._per_class(hits, predicted, actual, areas)
        if not self.multi_label:
            out["confusion"] = {"labels": self.labels, "matrix": matrix.astype(int).tolist()}
        return out

    def _class_counts(self, matrix: Array) -> tuple[Array, Array, Array]:
        if self.multi_label:  # [C, 2, 2]: actual, predicted
            return matrix[:, 1, 1], matrix[:, :, 1].sum(1), matrix[:, 1, :].sum(1)
        return np.diag(matrix), matrix.sum(0), matrix.sum(1)

    def _areas(self, actual: Array, rows: int) -> list[float | None]:
        """One-versus-rest AUROC per class; None where all rows or none are of the class."""
        with warnings.catch_warnings():  # torchmetrics warns about the classes that are left out here
            warnings.simplefilter("ignore", UserWarning)
            areas = self._auroc.compute()
        return [float(area) if 0 < count < rows else None for area, count in zip(areas, actual, strict=True)]

    def _per_class(
        self, hits: Array, predicted: Array, actual: Array, areas: list[float | None]
    ) -> dict[str, dict[str, Any]]:
        rates = {kind: _rate(kind, hits, predicted, actual) for kind in ("precision", "recall", "f1")}
        return {
            label: {
                **{kind: float(values[i]) for kind, values in rates.items()},
                "auroc": areas[i],
                "support": int(actual[i]),
                "predicted": int(predicted[i]),
            }
            for i, label in enumerate(self.labels)
        }

    def row_scores(self) -> Array:
        """Per row what the main metric is a function of the means of: `[n, 1]` 0/1 for accuracy."""
        table = self._rows.table()
        if self.main != "auroc":
            return table
        scores, truth = np.split(table, 2, axis=1)
        return np.concatenate([auroc_rows(scores[:, c], truth[:, c]) for c in range(scores.shape[1])], axis=1)

    def statistic(self) -> Callable[[Array], Array]:
        """From means of `row_scores` `[R, k]` to the main metric `[R]`."""
        if self.main in ("accuracy", "loss"):
            return lambda means: means[:, 0]
        if self.main == "ece":
            return lambda means: np.abs(means).sum(1)
        if self.main == "auroc":
            centre = self.compute()["auroc"] or 0.0
            return lambda means: _auroc_of(means, centre)
        return lambda means: from_counts(self.main, *np.split(means, 3, axis=1))


def _row_loss(scores: Tensor, targets: Tensor, multi_label: bool) -> Array:
    scores = scores.double().clamp(1e-12, 1 - 1e-12 if multi_label else 1.0)
    if not multi_label:
        return np.asarray(-scores.gather(1, targets[:, None]).log())
    return np.asarray(-torch.where(targets == 1, scores, 1 - scores).log().sum(1))


def _bin_gaps(scores: Tensor, targets: Tensor, predicted: Tensor, multi_label: bool) -> Array:
    """Confidence minus correctness of each row in the column of its confidence bin; ECE is the summed |mean|."""
    confidence = scores if multi_label else scores.max(1).values[:, None]
    right = targets if multi_label else (predicted == targets)[:, None]
    edges = torch.linspace(0, 1, _BINS + 1)
    bins = torch.bucketize(confidence, edges, right=True) - 1
    gaps = torch.zeros(len(scores), _BINS + 1, dtype=torch.float64)
    gaps.scatter_add_(1, bins, (confidence.double() - right.double()) / confidence.shape[1])
    return np.asarray(gaps)


def auroc_rows(scores: Array, truth: Array) -> Array:
    """What each row contributes to a one-versus-rest AUROC: `[n, 4]` (placement, 1) if positive, else in the last two.

    A positive's placement is the share of negatives below it (ties half), a negative's the share of positives above
    it; both average to the AUROC. Resampling them is the first-order bootstrap of the area (DeLong et al. 1988).
    """
    order_negative, order_positive = np.sort(scores[truth == 0]), np.sort(scores[truth == 1])
    out = np.zeros((len(scores), 4))
    for rows, columns, others in ((truth == 1, (0, 1), order_negative), (truth == 0, (2, 3), order_positive)):
        below = np.searchsorted(others, scores[rows], "left") + np.searchsorted(others, scores[rows], "right")
        share = below / 2 / max(len(others), 1)
        out[rows, columns[0]] = share if columns[0] == 0 else 1 - share
        out[rows, columns[1]] = 1
    return out


def _auroc_of(means: Array, centre: float) -> Array:
    """Macro AUROC from means of placements; classes without positives or negatives are left out."""
    parts = means.reshape(len(means), -1, 4)
    with np.errstate(divide="ignore", invalid="ignore"):
        positive, negative = parts[..., 0] / parts[..., 1], parts[..., 2] / parts[..., 3]
    defined = (parts[..., 1] > 0) & (parts[..., 3] > 0)
    total = np.where(defined, positive + negative, 0).sum(1) / np.maximum(defined.sum(1), 1)
    return np.asarray(total - centre)
