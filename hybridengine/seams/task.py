"""What a task is: how rows become batches, logits become a loss, and predictions become metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hybridengine.seams.randomness import KeyedRows
from hybridengine.seams.types import Batch, Out, Prediction, Term, View

if TYPE_CHECKING:
    from hybridengine.seams.context import Context

__all__ = ["Feature", "Metrics", "RandomRows", "Row", "Task"]

Row = Mapping[str, Any]
"""One example as the data gives it, columns already renamed to the task's roles (`text`, `label`, ...)."""

Feature = dict[str, Any]
"""One example as lists of ints by name: `input_ids`, where wanted `token_type_ids` and `perturbable` (1 for tokens that
an attack may move), `label` (the encoded target, absent for unlabelled rows), and the numbers `length` (for bucketing)
and `truncated` (whether tokens were cut off)."""

RandomRows = Callable[[str, Sequence[int]], KeyedRows]
"""`random(stream, rows)`: keyed random numbers for a batch, e.g. which tokens a masked LM hides."""


class Metrics(Protocol):
    """Streaming metrics of one split."""

    def update(self, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> None:
        """Take in one batch."""
        ...

    def compute(self) -> dict[str, Any]:
        """All numbers; scalars by name, plus nested tables such as `per_class` and `confusion`."""
        ...

    def row_scores(self) -> NDArray[np.float64]:
        """Numbers per row `[n, k]`, in the order of row ids, that the main metric is a function of the means of.

        `k` is 1 and the function the identity where the metric is itself a mean (accuracy).
        """
        ...

    def statistic(self) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        """Means of `row_scores` over resampled rows `[R, k]` to the main metric `[R]`."""
        ...


@runtime_checkable
class Task(Protocol):
    """A task, built by the hook `build_task`. One object serves one run.

    Attributes:
        auto_class: the transformers class that loads its model, e.g. `AutoModelForSequenceClassification`.
        columns: role to default column name, e.g. `{"text": "text", "label": "label"}`.
        optional_columns: roles that rows may lack.
        metric: name of the main metric; `greater_is_better` its direction.
        metric_names: every metric that `evaluate.metric` may name.
        unit: the unit its leaf loss is counted in (`rows` or `tokens`).
        head: patterns naming the head's parameters.

    A task may also say `distribution = "bernoulli"`, where each logit decides about a label of its own; without it
    logits are those of a softmax. `kl_rows` asks for it.
    """

    auto_class: str
    columns: Mapping[str, str]
    optional_columns: Sequence[str]
    metric: str
    greater_is_better: bool
    metric_names: Sequence[str]
    unit: str
    head: Sequence[str]

    def check_row(self, row: Row) -> str | None:
        """Why this row cannot be used, or None; an unlabelled row, or one to predict, lacks the roles of targets."""
        ...

    def prepare(self, run: Any, rows: Sequence[Row]) -> None:
        """Learn what the training rows tell, e.g. the label set. Called once, before the model is built."""
        ...

    def model_options(self, run: Any) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`, e.g. `num_labels`, `id2label`."""
        ...

    def configure(self, run: Any, model: nn.Module) -> nn.Module:
        """Last adjustments of a loaded model, e.g. its pad token."""
        ...

    def features(self, run: Any, rows: Sequence[Row]) -> list[Feature]:
        """Tokenise many rows at once."""
        ...

    def collate(self, run: Any, features: Sequence[Feature], rows: Sequence[int], random: RandomRows) -> Batch:
        """Pad features into a batch with masks and counts; `rows` are their global ids."""
        ...

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """The leaf loss."""
        ...

    def terms(self, logits: Tensor, batch: Batch, **options: Any) -> dict[str, Term]:
        """The leaf loss from logits; options `weight` `[C]` and `label_smoothing`."""
        ...

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Evaluate a batch without gradients."""
        ...

    def metrics(self, run: Any) -> Metrics:
        """Fresh streaming metrics."""
        ...

    def records(self, run: Any, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        """One JSON-able prediction per row, in order; `rows` are the batch's raw rows."""
        ...
