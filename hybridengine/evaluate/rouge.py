"""ROUGE of generated texts, through the `rouge-score` package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybridengine.errors import ConfigError
from hybridengine.evaluate.metrics import Array, LossMean, RowTable, check_metric
from hybridengine.seams.task import Row
from hybridengine.seams.types import Batch, Prediction

__all__ = ["RougeMetrics", "check_rouge"]

_VARIANTS = ("rouge1", "rouge2", "rougeL")


def check_rouge() -> None:
    """Raise `ConfigError` if `rouge-score` is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise ConfigError("ROUGE needs the package rouge-score; run `pip install 'hybridengine[summarization]'`")


class RougeMetrics:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L between generated and reference summaries, and the loss.

    Args:
        decode: from token ids `[B, T]` to texts.
        stemmer: whether words are stemmed first (English).

    Raises:
        ConfigError: if `rouge-score` is not installed.
    """

    NAMES = (*_VARIANTS, "loss")

    def __init__(self, decode: Callable[[Any], list[str]], main: str = "rougeL", *, stemmer: bool = True) -> None:
        check_rouge()
        from rouge_score.rouge_scorer import RougeScorer

        self.main = check_metric(main, self.NAMES, "summarization")
        self._decode = decode
        self._scorer = RougeScorer(list(_VARIANTS), use_stemmer=stemmer)
        self._loss = LossMean()
        self._rows = RowTable()

    def update(self, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> None:
        """Take in one batch; rows must have a `summary`."""
        self._loss.update(batch, prediction)
        texts = self._decode(prediction.generated) if prediction.generated is not None else [""] * len(rows)
        numbers = np.zeros((len(rows), len(_VARIANTS) + 2))
        for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
            scores = self._scorer.score(row["summary"], text)
            numbers[index, : len(_VARIANTS)] = [scores[name].fmeasure for name in _VARIANTS]
        if prediction.per_row:
            numbers[:, -2] = prediction.per_row["loss"].detach().cpu()
            numbers[:, -1] = prediction.per_row["tokens"].detach().cpu()
        self._rows.add(batch.rows, numbers)

    def compute(self) -> dict[str, Any]:
        """`rouge1`, `rouge2`, `rougeL`, `loss`, `rows`."""
        if not len(self._rows):
            return {"rows": 0}
        means = self._rows.table().mean(0)
        rouge = {name: float(means[i]) for i, name in enumerate(_VARIANTS)}
        return {**rouge, **self._loss.compute(), "rows": len(self._rows)}

    def row_scores(self) -> Array:
        """The row's own F-measure `[n, 1]`; its loss and tokens `[n, 2]` where the loss is the main metric."""
        table = self._rows.table()
        return table[:, -2:] if self.main == "loss" else table[:, [_VARIANTS.index(self.main)]]

    def statistic(self) -> Callable[[Array], Array]:
        """The mean, or the ratio of means for the loss."""
        if self.main == "loss":
            return lambda means: np.asarray(means[:, 0] / means[:, 1])
        return lambda means: means[:, 0]
