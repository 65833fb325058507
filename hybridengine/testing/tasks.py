"""Put a task on a model: its run, context and batches, as the engine makes them, for tests of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybridengine.config import load_config
from hybridengine.plugin.calling import Hooks
from hybridengine.plugin.stacking import Method
from hybridengine.run import Run
from hybridengine.seams import Batch, Context, KeyedRows, Prediction, Row, Sites, View
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.stack import as_method, compose

__all__ = ["TaskBench", "set_up_task"]


@dataclass
class TaskBench:
    """A task on its model, in evaluation mode."""

    run: Run
    ctx: Context

    def batch(self, rows: Sequence[Row], ids: Sequence[int] | None = None, step: int = 0) -> Batch:
        """Rows, tokenised and collated; `step` keys what is random about it."""

        def random(stream: str, keyed: Sequence[int]) -> KeyedRows:
            return KeyedRows((self.run.seed, stream, step), keyed)

        task = self.run.task
        made: Batch = task.collate(self.run, task.features(self.run, rows), ids or range(len(rows)), random)
        return made

    def loss(self, batch: Batch) -> float:
        """The leaf loss of a batch: the sum of its terms over its units."""
        out = self.ctx.loss(self.ctx, batch, View())
        return sum(float(value.detach()) / batch.counts[unit] for value, unit in out.terms.values())

    def predict(self, batch: Batch) -> Prediction:
        """The prediction of a batch."""
        return self.ctx.predict(self.ctx, batch, View())

    def evaluate(self, rows: Sequence[Row], batch_size: int = 4) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics and records of rows, batch by batch."""
        metrics, records = self.run.task.metrics(self.run), []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = self.batch(part, range(start, start + len(part)))
            prediction = self.predict(batch)
            metrics.update(batch, prediction, part)
            records += list(self.run.task.records(self.run, batch, prediction, part))
        return metrics.compute(), records


def set_up_task(
    task: Any,
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    methods: Sequence[object] = (),
    metric: str | None = None,
    data: dict[str, Any] | None = None,
    **train: Any,
) -> TaskBench:
    """Prepare a task with training rows and configure its model; the head must have the right size already.

    Args:
        task: the task object.
        methods: method objects to stand around it.
        metric: `evaluate.metric`.
        data: further keys of the section `data`.
        train: keys of the section `train`.
    """
    sections = {"model": {"name": "tiny"}, "data": {"train": "rows", **(data or {})}, "train": train}
    config, _ = load_config({"task": "tiny", **sections, "evaluate": {"metric": metric}})
    run = Run(config, torch.device("cpu"), Precision("fp32", None), LossScale())
    members: list[Method] = [as_method(method) for method in methods]
    hooks = Hooks(members)
    run.task, run.tokenizer = task, tokenizer
    task.prepare(run, rows)
    run.attach(hooks)
    run.model = run.forward_model = hooks.transform("transform_model", run, task.configure(run, model.eval()))
    bench = TaskBench(run, compose(run, hooks))
    run.probe = bench.batch(list(rows[:2])).inputs
    run.sites = Sites(run.model, run.probe)
    hooks.notify("on_run_start", run)
    run.freeze_parameter_sets()
    return bench
