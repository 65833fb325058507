"""Evaluate one split: predictions, metrics with an interval, the loss, and records of every row."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from hybridengine.batches import Assembler, Sampler, in_order
from hybridengine.evaluate.statistics import bootstrap_interval
from hybridengine.plugin.calling import Hooks
from hybridengine.run import Run
from hybridengine.seams.context import Context
from hybridengine.seams.task import Row
from hybridengine.seams.types import Batch, Draw, Prediction, View
from hybridengine.stack.compose import evaluation

__all__ = ["Evaluator"]


class Evaluator:
    """Evaluates splits of a run through the predict seam.

    Args:
        lengths: token lengths of the rows of every split that is to be evaluated. A split that a sampler refuses is
            refused here, not after the first epoch.

    Attributes:
        splits: their names.
        stored_weights: the model holds the weights of `best/`, so averaged weights are not swapped in again.
    """

    def __init__(
        self, run: Run, ctx: Context, hooks: Hooks, assembler: Assembler, lengths: dict[str, list[int]]
    ) -> None:
        self._run = run
        self._ctx = ctx
        self._hooks = hooks
        self._assembler = assembler
        self.splits = tuple(lengths)
        self._samplers = {split: self._sampler(split, lengths[split]) for split in lengths}
        self.stored_weights = False

    def predictions(self, split: str) -> Iterator[tuple[Draw, Batch, Prediction]]:
        """Every batch of a split with its prediction, inside the evaluation contexts."""
        recording, self._ctx.trace.recording = self._ctx.trace.recording, False
        try:
            with evaluation(self._ctx, self._hooks, stored=self.stored_weights):
                for draw in self._samplers[split](0):
                    batch = self._assembler.batch(split, draw, 0).to(self._run.device)
                    # Without a key, dropout modes that stay on in evaluation would touch the global stream.
                    yield draw, batch, self._ctx.predict(self._ctx, batch, View(key=0))
        finally:
            self._ctx.trace.recording = recording

    def evaluate(
        self, split: str, *, interval: bool = True, record: Callable[[list[str]], None] | None = None
    ) -> dict[str, Any]:
        """Metrics of a split; `ci95` is the bootstrap interval of the main one, over rows unless a method gave one.

        Args:
            record: takes one JSON line per row, e.g. to append them to a file.
        """
        run = self._run
        metrics = run.task.metrics(run)
        sums: dict[str, float] = defaultdict(float)
        counts: Counter[str] = Counter()
        lines: list[str] = []
        for draw, batch, prediction in self.predictions(split):
            rows = self._rows(split, draw, batch)
            metrics.update(batch, prediction, rows)
            for name, (value, unit) in prediction.terms.items():
                sums[name] += float(value)
                counts[name] += batch.counts[unit]
            if record is not None:
                made = run.task.records(run, batch, prediction, rows)
                for position, values in zip(draw.rows, made, strict=True):
                    lines.append(json.dumps({"split": split, "row": position, **values}, ensure_ascii=False))
        result: dict[str, Any] = dict(metrics.compute())
        result.update({name: sums[name] / max(counts[name], 1) for name in sums if name not in result})
        result["main"] = run.config.evaluate.metric or run.task.metric
        result = self._hooks.transform("transform_metrics", run, result, expect=dict)
        if interval and "ci95" not in result:  # a sampler whose rows are no independent draws has its own
            bounds = bootstrap_interval(metrics, resamples=run.config.evaluate.resamples, seed=run.seed)
            result["ci95"] = None if bounds is None else list(bounds)
        if record is not None:
            record(lines)
        return result

    def _rows(self, split: str, draw: Draw, batch: Batch) -> list[Row]:
        """The raw rows of a batch; where a draw renumbers the classes, under the names of the model's outputs."""
        rows: list[Row] = [self._run.splits[split].rows[i] for i in draw.rows]
        if draw.relabel is None or batch.targets is None:
            return rows
        names = [self._run.labels[target] for target in batch.targets.tolist()]
        return [{**row, "label": name} for row, name in zip(rows, names, strict=True)]

    def _sampler(self, split: str, lengths: list[int]) -> Sampler:
        made: Sampler | None = self._hooks.build("build_sampler", self._run, split)
        return made or in_order(lengths, self._run.config.evaluate.batch_size)


def better(value: float, best: float | None, greater: bool) -> bool:
    """Whether a metric value is an improvement; NaN never is."""
    if not math.isfinite(value):
        return False
    return best is None or (value > best if greater else value < best)
