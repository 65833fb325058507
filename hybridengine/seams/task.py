"""What a task is: how rows become batches, logits become a loss, and predictions become metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from hybridengine.seams.randomness import KeyedRows
from hybridengine.seams.types import Batch, Out, Prediction, Term, View

if TYPE_CHECKING:
    from hybridengine.seams.context import Context

__all__ = ["Feature", "Metrics", "RandomRows", "Row", "Task"]

Row = Mapping[str, Any]
"""One example as the data gives it, columns already renamed to the task's roles (`text`, `label`, ...)."""

Feature = dict[str, Any]
"""One example as token ids and masks: lists of ints by name, with `length` for bucketing."""

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

    def row_scores(self) -> list[float]:
        """One number per row whose resampled statistic is the main metric (for the bootstrap interval)."""
        ...

    def statistic(self) -> Callable[[Any], Any]:
        """Resampled row scores `[R, n]` to the main metric `[R]`; the mean unless the metric is not a mean."""
        ...


@runtime_checkable
class Task(Protocol):
    """A task, built by the hook `build_task`. One object serves one run.

    Attributes:
        auto_class: the transformers class that loads its model, e.g. `AutoModelForSequenceClassification`.
        columns: role to default column name, e.g. `{"text": "text", "label": "label"}`.
        optional_columns: roles that rows may lack.
        metric: name of the main metric; `greater_is_better` its direction.
        unit: the unit its leaf loss is counted in (`rows` or `tokens`).
        head: patterns naming the head's parameters.
    """

    auto_class: str
    columns: Mapping[str, str]
    optional_columns: Sequence[str]
    metric: str
    greater_is_better: bool
    unit: str
    head: Sequence[str]

    def check_row(self, row: Row) -> str | None:
        """Why this row cannot be used, or None."""
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

    def records(self, run: Any, batch: Batch, prediction: Prediction) -> Iterable[dict[str, Any]]:
        """One JSON-able prediction per row, in order."""
        ...
