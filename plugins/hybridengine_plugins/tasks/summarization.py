"""Write a short text for a long one with an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.errors import DataError, ModelError
from hybridengine.evaluate import RougeMetrics, check_metric, check_rouge
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Feature, Out, Prediction, RandomRows, Row, Term, View
from hybridengine.text import (
    IGNORED,
    base_model,
    head_patterns,
    padded,
    padded_inputs,
    set_pad_token,
    special_ids,
    token_prediction,
    token_terms,
    tokenise,
    usable_length,
)

__all__ = ["Summarization"]


@dataclass(eq=False)
class Summarization:
    """Generate a summary (or any other text) from a text.

    Roles: `text`, `summary`. The leaf loss is cross-entropy summed over the tokens of the summary; its unit is the
    token. The decoder's input is given explicitly, so that its embedding is a site that methods can perturb. Evaluation
    generates with beam search and scores ROUGE, and gives the loss under the true summary. Needs
    `pip install 'hybridengine[summarization]'`.
    """

    traits: ClassVar[Traits] = Traits(kind="task", family="tasks")

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    columns: ClassVar[Mapping[str, str]] = {"text": "text", "summary": "summary"}
    optional_columns: ClassVar[Sequence[str]] = ()
    metric: ClassVar[str] = "rougeL"
    metric_names: ClassVar[Sequence[str]] = RougeMetrics.NAMES
    greater_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"
    head: ClassVar[Sequence[str]] = head_patterns("lm_head")

    prefix: str = parameter("", "written before every text, e.g. 'summarize: ' for T5")
    num_beams: int = parameter(1, "beams of the search; 1 is greedy", ge=1)
    max_new_tokens: int = parameter(64, "tokens generated, and kept of each true summary", ge=1)
    stemmer: bool = parameter(True, "whether ROUGE compares stems (English)")

    @hook
    def build_task(self, run: Run) -> Summarization:
        """This object is the task."""
        return self

    def check_row(self, row: Row) -> str | None:
        """Any two texts will do."""
        return None

    def prepare(self, run: Run, rows: Sequence[Row]) -> None:
        """Nothing to learn; that the metric exists and can be computed is checked before a model is loaded."""
        if run.config.evaluate.metric:
            check_metric(run.config.evaluate.metric, self.metric_names, "summarization")
        check_rouge()

    def model_options(self, run: Run) -> dict[str, Any]:
        """None."""
        return {}

    def configure(self, run: Run, model: nn.Module) -> nn.Module:
        """Agree on the padding token.

        Raises:
            ModelError: if the model has no token that starts the decoder.
        """
        set_pad_token(run, model)
        config = base_model(model).config
        if getattr(config, "decoder_start_token_id", None) is None:
            raise ModelError(
                "the model's configuration has no decoder_start_token_id, so generation cannot start; set it in its"
                " config.json (T5: the padding token, BART: the end token)"
            )
        return model

    def features(self, run: Run, rows: Sequence[Row]) -> list[Feature]:
        """Tokenise texts and summaries; `label` holds the summary's ids."""
        texts = [self.prefix + row["text"] for row in rows]
        features, _ = tokenise(run.tokenizer, texts, max_length=usable_length(run))
        known = [i for i, row in enumerate(rows) if row.get("summary") is not None]
        if known:
            summaries = [rows[i]["summary"] for i in known]
            labels = run.tokenizer(text_target=summaries, truncation=True, max_length=self.max_new_tokens)["input_ids"]
            for index, label in zip(known, labels, strict=True):
                features[index]["label"] = label
        return features

    def collate(self, run: Run, features: Sequence[Feature], rows: Sequence[int], random: RandomRows) -> Batch:
        """Pad text and summary on the right; targets `[B, T]` with -100 at padding.

        Rows without a summary get a decoder input of one start token, and no targets.
        """
        inputs, masks = padded_inputs(run, features, side="right")
        labels = [feature.get("label", []) for feature in features]
        targets = padded(labels, IGNORED)
        attention = (targets != IGNORED).long()
        decoder = _decoder_input(run.model, targets, run.tokenizer.pad_token_id)
        special = torch.tensor(sorted(special_ids(run.tokenizer)))
        movable = torch.zeros_like(attention)
        movable[:, 1:] = attention[:, 1:] * ~torch.isin(decoder[:, 1:], special)
        masks["attention"]["decoder_input_ids"] = attention
        masks["perturbable"]["decoder_input_ids"] = movable
        masks["scored"] = {"decoder_input_ids": attention}
        size, labelled = len(features), all("label" in feature for feature in features)
        counts = {"rows": size, "all_rows": size, "episodes": 1, "tokens": int(attention.sum())}
        inputs["decoder_input_ids"] = decoder
        return Batch(inputs, targets if labelled else None, tuple(rows), masks, counts)

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """Cross-entropy summed over the summary's tokens."""
        (out,) = ctx.outputs(batch, [view])
        return replace(out, terms=self.terms(out.logits, batch))

    def terms(
        self, logits: Tensor, batch: Batch, *, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> dict[str, Term]:
        """The loss from logits `[B, T, V]`.

        Raises:
            DataError: if the batch has no summaries.
        """
        if batch.targets is None:
            raise DataError("these rows have no summary, so they have no loss")
        return token_terms(logits, batch, weight=weight, label_smoothing=label_smoothing)

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Generated ids `[B, T]`, and the loss of the true summary where there is one."""
        with torch.no_grad():
            generated = ctx.run.model.generate(
                input_ids=batch.inputs["input_ids"],
                attention_mask=batch.inputs["attention_mask"],
                num_beams=self.num_beams,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
            if batch.targets is None:
                return Prediction(generated=generated)
            (out,) = ctx.outputs(batch, [view])
            return replace(token_prediction(out.logits, batch), generated=generated)

    def metrics(self, run: Run) -> RougeMetrics:
        """Fresh metrics."""
        main = run.config.evaluate.metric or self.metric
        return RougeMetrics(lambda ids: _texts(run.tokenizer, ids), main, stemmer=self.stemmer)

    def records(self, run: Run, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Text, true summary where there is one, and the generated one."""
        for row, text in zip(rows, _texts(run.tokenizer, prediction.generated), strict=True):
            known = {"label": row["summary"]} if row.get("summary") is not None else {}
            yield {"text": row["text"], **known, "prediction": text}


def _texts(tokenizer: Any, generated: Any) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(generated, skip_special_tokens=True)]


def _decoder_input(model: Any, targets: Tensor, pad: int) -> Tensor:
    """The targets one step later, behind the start token; as the model itself would shift them."""
    inner = base_model(model)
    if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = inner.prepare_decoder_input_ids_from_labels(labels=targets)
        return shifted
    start = torch.full_like(targets[:, :1], inner.config.decoder_start_token_id)
    return torch.cat([start, targets[:, :-1].masked_fill(targets[:, :-1] == IGNORED, pad)], dim=1)
