"""Continue text: causal language modelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.evaluate import LossMetrics, check_metric
from hybridengine.plugin import Run, Split, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Feature, Out, Prediction, RandomRows, Row, Term, View
from hybridengine.text import (
    IGNORED,
    blocks,
    head_patterns,
    padded_inputs,
    set_pad_token,
    token_prediction,
    token_terms,
    tokenise,
    usable_length,
)

__all__ = ["LanguageModeling"]


@dataclass(eq=False)
class LanguageModeling:
    """Predict every next token of a text.

    Role: `text`. The leaf loss is cross-entropy summed over predicted tokens; its unit is the token. Targets are
    shifted once, when the batch is made: `targets[:, i]` is the token after position i, so that they stand beside the
    logits. The first token of a row is never predicted, padding neither. Metrics: loss, perplexity.

    One row is one sequence, cut at `train.max_length` tokens. Long documents are better split: `block: 180` makes a row
    of every 180 words, before the model is loaded, so that each piece has an id, a length and a record of its own.
    """

    traits: ClassVar[Traits] = Traits(kind="task", family="tasks")

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    columns: ClassVar[Mapping[str, str]] = {"text": "text"}
    optional_columns: ClassVar[Sequence[str]] = ()
    metric: ClassVar[str] = "perplexity"
    metric_names: ClassVar[Sequence[str]] = LossMetrics.NAMES
    greater_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "tokens"
    head: ClassVar[Sequence[str]] = head_patterns("lm_head", "embed_out")

    block: int | None = parameter(None, "split rows into pieces of at most this many words", gt=0)

    @hook
    def build_task(self, run: Run) -> LanguageModeling:
        """This object is the task."""
        return self

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Split long rows into pieces, in every split."""
        return None if self.block is None else {name: split_rows(split, self.block) for name, split in splits.items()}

    def check_row(self, row: Row) -> str | None:
        """Any text will do."""
        return None

    def prepare(self, run: Run, rows: Sequence[Row]) -> None:
        """Nothing to learn; the metric's name is checked."""
        if run.config.evaluate.metric:
            check_metric(run.config.evaluate.metric, self.metric_names, "language-modeling")

    def model_options(self, run: Run) -> dict[str, Any]:
        """None."""
        return {}

    def configure(self, run: Run, model: nn.Module) -> nn.Module:
        """Agree on the padding token."""
        set_pad_token(run, model)
        return model

    def features(self, run: Run, rows: Sequence[Row]) -> list[Feature]:
        """Tokenise all rows."""
        return tokenise(run.tokenizer, [row["text"] for row in rows], max_length=usable_length(run))[0]

    def collate(self, run: Run, features: Sequence[Feature], rows: Sequence[int], random: RandomRows) -> Batch:
        """Pad to the longest; targets `[B, L]` are the next tokens, -100 where there is none."""
        inputs, masks = padded_inputs(run, features)
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        scored = torch.zeros_like(attention)
        scored[:, :-1] = attention[:, :-1] * attention[:, 1:] * (ids[:, 1:] >= 0)  # no soft token is predicted
        targets = torch.full_like(ids, IGNORED)
        targets[:, :-1] = torch.where(scored[:, :-1] == 1, ids[:, 1:], IGNORED)
        size = len(features)
        counts = {"rows": size, "all_rows": size, "episodes": 1, "tokens": int(scored.sum())}
        return Batch(inputs, targets, tuple(rows), {**masks, "scored": {"input_ids": scored}}, counts)

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """Cross-entropy summed over predicted tokens."""
        (out,) = ctx.outputs(batch, [view])
        return replace(out, terms=self.terms(out.logits, batch))

    def terms(
        self, logits: Tensor, batch: Batch, *, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> dict[str, Term]:
        """The loss from logits `[B, L, V]`."""
        return token_terms(logits, batch, weight=weight, label_smoothing=label_smoothing)

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Loss and predicted tokens of each row; no probabilities, which would be as large as the vocabulary."""
        with torch.no_grad():
            (out,) = ctx.outputs(batch, [view])
            return token_prediction(out.logits, batch)

    def metrics(self, run: Run) -> LossMetrics:
        """Fresh metrics."""
        return LossMetrics(run.config.evaluate.metric or self.metric, names=self.metric_names)

    def records(self, run: Run, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Text, its mean loss and number of predicted tokens."""
        losses, tokens = (prediction.per_row[name].tolist() for name in ("loss", "tokens"))
        for row, loss, count in zip(rows, losses, tokens, strict=True):
            yield {"text": row["text"], "loss": round(loss / count, 6) if count else None, "tokens": count}


def split_rows(split: Split, words: int) -> Split:
    """A split whose rows hold at most `words` words each; pieces keep the line of the row they come from."""
    rows, lines = [], []
    for row, line in zip(split.rows, split.lines, strict=True):
        for piece in blocks(row["text"], words):
            rows.append({**row, "text": piece})
            lines.append(line)
    return Split(split.name, rows, split.source, lines)
