"""Fill in hidden words: masked language modelling, e.g. to adapt an encoder to a domain before a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import ModelError
from hybridengine.evaluate import LossMetrics, check_metric
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Feature, Out, Prediction, RandomRows, Row, Term, View
from hybridengine.text import (
    IGNORED,
    head_patterns,
    hide_tokens,
    padded_inputs,
    set_pad_token,
    to_side,
    token_prediction,
    token_terms,
    tokenise,
    usable_length,
)

__all__ = ["MaskedLanguageModeling"]


@dataclass(eq=False)
class MaskedLanguageModeling:
    """Hide some tokens of a text and predict them.

    Role: `text`. Every ordinary token is chosen with probability `share`, and at least one a row; of the chosen ones
    80% become the mask token, 10% a random ordinary token, 10% stay (Devlin et al. 2019). Special tokens are never
    chosen. Which tokens are chosen follows (seed, step, row) alone: neither the other rows of a batch, nor padding, nor
    a restart change it. The leaf loss is cross-entropy summed over chosen tokens; its unit is the token. Metrics: loss,
    perplexity, accuracy over chosen tokens.
    """

    traits: ClassVar[Traits] = Traits(
        kind="task", family="tasks", paper="Devlin et al.: BERT, NAACL 2019; Gururangan et al., ACL 2020"
    )

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    columns: ClassVar[Mapping[str, str]] = {"text": "text"}
    optional_columns: ClassVar[Sequence[str]] = ()
    metric: ClassVar[str] = "perplexity"
    metric_names: ClassVar[Sequence[str]] = LossMetrics.NAMES_WITH_ACCURACY
    greater_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "tokens"
    head: ClassVar[Sequence[str]] = head_patterns(
        "cls",
        "lm_head",
        "predictions",
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
        "generator_predictions",
        "generator_lm_head",
    )

    share: float = parameter(0.15, "share of ordinary tokens that are chosen", gt=0, lt=1)
    masked: float = parameter(0.8, "share of chosen tokens that become the mask token", ge=0, le=1)
    replaced: float = parameter(0.1, "share of chosen tokens that become a random token", ge=0, le=1)

    def __post_init__(self) -> None:
        if self.masked + self.replaced > 1:
            raise ValueError(f"masked ({self.masked}) and replaced ({self.replaced}) together must not exceed 1")

    @hook
    def build_task(self, run: Run) -> MaskedLanguageModeling:
        """This object is the task."""
        return self

    def check_row(self, row: Row) -> str | None:
        """Any text will do."""
        return None

    def prepare(self, run: Run, rows: Sequence[Row]) -> None:
        """Nothing to learn; the metric's name is checked."""
        if run.config.evaluate.metric:
            check_metric(run.config.evaluate.metric, self.metric_names, "masked-language-modeling")

    def model_options(self, run: Run) -> dict[str, Any]:
        """None."""
        return {}

    def configure(self, run: Run, model: nn.Module) -> nn.Module:
        """Agree on the padding token, and say so where the checkpoint had no head for this task.

        Raises:
            ModelError: if the tokenizer has no mask token.
        """
        if run.tokenizer.mask_token_id is None:
            raise ModelError(
                "the tokenizer has no mask token, so this is no masked language model; use `task: language-modeling`"
                " or an encoder such as BERT"
            )
        set_pad_token(run, model)
        if getattr(run, "missing_parameters", None):
            run.say(f"{run.config.model.name} has no masked-language-model head; a new one was added and is trained")
        return model

    def features(self, run: Run, rows: Sequence[Row]) -> list[Feature]:
        """Tokenise all rows."""
        return tokenise(run.tokenizer, [row["text"] for row in rows], max_length=usable_length(run))[0]

    def collate(self, run: Run, features: Sequence[Feature], rows: Sequence[int], random: RandomRows) -> Batch:
        """Pad to the longest and hide tokens; targets `[B, L]` are the hidden tokens, -100 elsewhere."""
        inputs, masks = padded_inputs(run, features)
        attention, ordinary = inputs["attention_mask"], masks["perturbable"]["input_ids"] == 1
        draws = random("mask", rows).uniform(attention.shape[1], 3)
        draws = to_side(draws, attention.sum(1), run.tokenizer.padding_side)
        options = {"share": self.share, "masked": self.masked, "replaced": self.replaced}
        hidden, chosen = hide_tokens(run.tokenizer, inputs["input_ids"], ordinary, draws, **options)
        targets = inputs["input_ids"].masked_fill(~chosen, IGNORED)
        inputs["input_ids"] = hidden
        size = len(features)
        counts = {"rows": size, "all_rows": size, "episodes": 1, "tokens": int(chosen.sum())}
        # An attack must not move what was hidden: the mask token carries no word.
        movable = masks["perturbable"]["input_ids"] * (inputs["input_ids"] != run.tokenizer.mask_token_id)
        masks = {**masks, "perturbable": {"input_ids": movable}, "scored": {"input_ids": chosen.long()}}
        return Batch(inputs, targets, tuple(rows), masks, counts)

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """Cross-entropy summed over hidden tokens."""
        (out,) = ctx.outputs(batch, [view])
        return replace(out, terms=self.terms(out.logits, batch))

    def terms(
        self, logits: Tensor, batch: Batch, *, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> dict[str, Term]:
        """The loss from logits `[B, L, V]`."""
        return token_terms(logits, batch, weight=weight, label_smoothing=label_smoothing)

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Loss, hidden tokens and rightly guessed ones of each row."""
        with torch.no_grad():
            (out,) = ctx.outputs(batch, [view])
            made = token_prediction(out.logits, batch)
            correct = (out.logits.argmax(-1) == batch.targets).sum(1)  # no token has the id of what is not scored
            return replace(made, per_row={**made.per_row, "correct": correct})

    def metrics(self, run: Run) -> LossMetrics:
        """Fresh metrics."""
        return LossMetrics(run.config.evaluate.metric or self.metric, names=self.metric_names)

    def records(self, run: Run, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Text, mean loss over its hidden tokens, and how many of them were guessed."""
        numbers = (prediction.per_row[name].tolist() for name in ("loss", "tokens", "correct"))
        for row, loss, count, right in zip(rows, *numbers, strict=True):
            mean = round(loss / count, 6) if count else None
            yield {"text": row["text"], "loss": mean, "tokens": count, "guessed": right}
