"""What all metrics share: names, directions, the mean loss, numbers kept per row; and metrics of language models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hybridengine.errors import ConfigError, did_you_mean
from hybridengine.seams.task import Row
from hybridengine.seams.types import Batch, Prediction

__all__ = ["Array", "LossMean", "LossMetrics", "RowTable", "check_metric", "greater_is_better"]

Array = NDArray[np.float64]

_LOWER_IS_BETTER = frozenset({"loss", "perplexity", "ece"})


def greater_is_better(name: str) -> bool:
    """The direction of a metric: only losses, perplexity and calibration error should fall."""
    return name not in _LOWER_IS_BETTER


def check_metric(name: str, known: Sequence[str], task: str) -> str:
    """The name itself.

    Raises:
        ConfigError: if the task has no such metric; names the nearest, or all.
    """
    if name not in known:
        raise ConfigError(f"evaluate.metric: {task} has no metric {name!r}.{did_you_mean(name, known)}")
    return name


def column(values: Tensor | Sequence[float]) -> Array:
    """Numbers of the rows of a batch as float64, on the CPU."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


class RowTable:
    """Numbers per row, gathered batch by batch and given back in the order of row ids."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._parts: list[Array] = []

    def add(self, ids: Sequence[int], values: Array) -> None:
        """Take in `[B]` or `[B, k]` numbers of rows `ids`."""
        self._ids.extend(ids)
        self._parts.append(values.reshape(len(ids), -1))

    def __len__(self) -> int:
        return len(self._ids)

    def table(self) -> Array:
        """All numbers `[n, k]`, so that neither batching nor order shows in what is computed from them."""
        if not self._parts:
            return np.zeros((0, 1))
        return np.concatenate(self._parts)[np.argsort(self._ids, kind="stable")]


class LossMean:
    """The mean loss over a split: every term's sum over its units' total."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, str]] = {}
        self._counts: Counter[str] = Counter()

    def update(self, batch: Batch, prediction: Prediction) -> None:
        """Take in a batch."""
        for unit in {unit for _, unit in prediction.terms.values()}:
            self._counts[unit] += batch.counts[unit]
        for name, (value, unit) in prediction.terms.items():
            self._sums[name] = (self._sums.get(name, (0.0, unit))[0] + float(value), unit)

    def compute(self) -> dict[str, float]:
        """`{"loss": mean}`, or nothing where no batch had a loss."""
        if not self._sums:
            return {}
        return {"loss": sum(value / max(self._counts[unit], 1) for value, unit in self._sums.values())}


class LossMetrics:
    """Loss and perplexity of a language model, over all scored tokens; token accuracy where predictions carry it.

    Reads `prediction.per_row`: `loss` (summed over the row's scored tokens), `tokens`, and optionally `correct`.
    """

    NAMES = ("loss", "perplexity")
    NAMES_WITH_ACCURACY = (*NAMES, "accuracy")

    def __init__(self, main: str = "perplexity", *, names: Sequence[str] = NAMES_WITH_ACCURACY) -> None:
        self.main = check_metric(main, names, "a language model")
        self._rows = RowTable()

    def update(self, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> None:
        """Take in one batch."""
        numbers = [
            column(prediction.per_row[name]) for name in ("loss", "tokens", "correct") if name in prediction.per_row
        ]
        self._rows.add(batch.rows, np.stack(numbers, axis=1))

    def compute(self) -> dict[str, Any]:
        """`loss` and `perplexity` (None past the largest float), `accuracy` where known, `tokens`, `rows`."""
        table = self._rows.table()
        sums = table.sum(0)
        tokens = sums[1] if len(sums) > 1 else 0.0
        if not tokens:
            return {"loss": None, "perplexity": None, "tokens": 0, "rows": len(self._rows)}
        loss = float(sums[0] / tokens)
        out: dict[str, Any] = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None}
        if len(sums) > 2:
            out["accuracy"] = float(sums[2] / tokens)
        return {**out, "tokens": int(tokens), "rows": len(self._rows)}

    def row_scores(self) -> Array:
        """Summed loss (or correct tokens) and scored tokens of each row `[n, 2]`."""
        return self._rows.table()[:, [2 if self.main == "accuracy" else 0, 1]]

    def statistic(self) -> Callable[[Array], Array]:
        """The ratio of the two means; its exponential for perplexity."""

        def ratio(means: Array) -> Array:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                value = means[:, 0] / means[:, 1]
                return np.exp(value) if self.main == "perplexity" else value

        return ratio
