"""Contextual calibration: what the model prefers without having read anything does not count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridengine.errors import StackError
from hybridengine.plugin import Band, Run, Split, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Prediction, View
from hybridengine.text import batch_of

__all__ = ["Calibration"]


@dataclass(eq=False)
class Calibration:
    """Divides each class's probability by what the model gives the class for texts that say nothing.

    Maths: q = mean over the texts z of `content` of p(y|z), all columns of a row being z; a row's probabilities become
    p(y|x)/q(y), divided by their sum. So a text without content gets the same probability for every class, exactly
    where `content` is one text. It is done when predicting and evaluating, and for the validation loss; training is
    not touched. q is asked anew for every batch. Its distance from uniform, in total variation, is the metric
    `content_free_bias`.

    Paper: Zhao et al. 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models".
    Hooks: `transform_data`, `wrap_predict`, `transform_metrics`. Cost: none in training; a forward over a few short
    rows for each batch that is predicted. Combines with `template` and its kin (the texts are written like any row),
    and with plain classifiers; little is left to correct where training saw all classes alike.
    """

    traits: ClassVar[Traits] = Traits(
        family="prompts",
        order=Band.AVERAGE,
        requires=("labels",),
        conflicts={"episodes": "a text without content belongs to no episode; remove one of the two"},
        cost="none in training; predicting asks the model about a few short rows more for each batch",
        paper="Zhao et al. 2021, arXiv:2102.09690",
        combines="template, demonstrations, pet, averages; not episodes",
    )

    content: list[str] = parameter(lambda: ["N/A", "[MASK]", ""], "texts that say nothing", min_length=1)
    _ids: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)
    _bias: Tensor | None = field(default=None, init=False, repr=False)

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Leave the data; only say early that some tasks have no classes of rows.

        Raises:
            StackError: rows do not have exactly one label.
        """
        if not run.dry and ("label" not in run.task.columns or getattr(run.task, "multi_label", False)):
            raise StackError("calibration needs one label for each row, which this task does not have; remove it")
        return None

    @hook
    def on_run_start(self, run: Run) -> None:
        """Forget the rows made up in another run."""
        self._ids.clear()

    @hook
    def wrap_predict(self, inner: Callable[..., Prediction], ctx: Context, batch: Batch, view: View) -> Prediction:
        """The prediction, divided by that of rows without content."""
        prediction = inner(ctx, batch, view)
        assert prediction.scores is not None
        columns = [_texts(row) for row in ctx.run.rows_of(batch.rows)]
        priors = {own: self._prior(inner, ctx, view, own) for own in dict.fromkeys(columns)}
        self._bias = torch.stack([(q - 1 / len(q)).abs().sum() / 2 for q in priors.values()]).mean()
        prior = torch.stack([priors[own] for own in columns])
        # In logarithms, for a class that a sure model gives 0 would stay at 0 whatever its prior.
        logits = _log(prediction.scores) - _log(prior)
        terms = {} if batch.targets is None else ctx.run.task.terms(logits, batch)
        return replace(prediction, scores=logits.softmax(-1), terms=terms)

    def _prior(self, inner: Callable[..., Prediction], ctx: Context, view: View, columns: tuple[str, ...]) -> Tensor:
        rows = [dict.fromkeys(columns, text) for text in self.content]
        if columns not in self._ids:
            self._ids[columns] = ctx.run.make_up(rows)
        made = inner(ctx, batch_of(ctx.run, rows, self._ids[columns]), view.clean())
        assert made.scores is not None
        return made.scores.mean(0)

    @hook
    def transform_metrics(self, run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
        """How far the last prior was from uniform, beside the other metrics."""
        return metrics if self._bias is None else {**metrics, "content_free_bias": float(self._bias)}


def _texts(row: Any) -> tuple[str, ...]:
    """The columns of a row that hold text."""
    return tuple(sorted(name for name, value in row.items() if isinstance(value, str) and name != "label"))


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
