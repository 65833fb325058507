"""Tag words: named entities, parts of speech, chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridengine.data import label_id, label_name, label_options, label_order
from hybridengine.errors import DataError
from hybridengine.evaluate import SpanMetrics, check_metric, word_tags
from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Feature, Out, Prediction, RandomRows, Row, Term, View
from hybridengine.text import (
    IGNORED,
    head_patterns,
    padded,
    padded_inputs,
    set_pad_token,
    token_prediction,
    token_terms,
    tokenise,
    usable_length,
)

__all__ = ["TokenClassification"]


@dataclass(eq=False)
class TokenClassification:
    """Predict a tag for every word of a sentence.

    Roles: `tokens` (a list of words) and `tags` (a list as long; BIO for spans). A word's tag stands at its first
    piece; other pieces, special tokens and padding are not scored. The leaf loss is cross-entropy summed over scored
    tokens; its unit is the token. Metrics: precision, recall and F1 of whole spans, accuracy of tags. Words that were
    cut off at `train.max_length` count as tagged `O`.
    """

    traits: ClassVar[Traits] = Traits(kind="task", family="tasks")

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    columns: ClassVar[Mapping[str, str]] = {"tokens": "tokens", "tags": "tags"}
    optional_columns: ClassVar[Sequence[str]] = ()
    metric: ClassVar[str] = "f1"
    metric_names: ClassVar[Sequence[str]] = SpanMetrics.NAMES
    greater_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "tokens"
    head: ClassVar[Sequence[str]] = head_patterns("classifier", "score")

    labels: list[str] = parameter(list, "tags in the order of their ids")
    _ids: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    @hook
    def build_task(self, run: Run) -> TokenClassification:
        """This object is the task."""
        return self

    def check_row(self, row: Row) -> str | None:
        """Words must be strings that are not blank; tags, where given, as many as words."""
        for word in row["tokens"]:
            if not isinstance(word, str):
                return f"tokens must be strings, not {type(word).__name__}"
            if not word.strip():
                return "tokens hold a blank word"
        tags = row.get("tags")
        if tags is None:
            return None
        if len(tags) != len(row["tokens"]):
            return f"there are {len(row['tokens'])} tokens but {len(tags)} tags"
        return None

    def prepare(self, run: Run, rows: Sequence[Row]) -> None:
        """Learn the tag set of the training rows."""
        if run.config.evaluate.metric:
            check_metric(run.config.evaluate.metric, self.metric_names, "token-classification")
        names = {label_name(tag) for row in rows for tag in row.get("tags") or ()}
        run.labels = label_order(names, self.labels or list(dict.fromkeys(run.config.data.labels.values())))
        if len(run.labels) < 2:
            raise DataError(f"the training rows hold the tags {run.labels}; two are needed")
        self._ids = {name: index for index, name in enumerate(run.labels)}

    def model_options(self, run: Run) -> dict[str, Any]:
        """Head size and tag names."""
        return label_options(run.labels)

    def configure(self, run: Run, model: nn.Module) -> nn.Module:
        """Agree on the padding token."""
        set_pad_token(run, model)
        return model

    def features(self, run: Run, rows: Sequence[Row]) -> list[Feature]:
        """Tokenise words into pieces; `label` holds -100 except at first pieces, `scored` is 1 there."""
        length = usable_length(run)
        words = [_spaced(run.tokenizer, row["tokens"]) for row in rows]
        features, encoded = tokenise(run.tokenizer, words, max_length=length, words=True)
        lost = [i for i, feature in enumerate(features) if _lost(encoded.word_ids(i), words[i], feature["truncated"])]
        for index in lost:
            # A word of invisible characters has no piece; as an unknown word it keeps its place in the count.
            words[index] = [_visible(run.tokenizer, word) for word in words[index]]
            (features[index],), again = tokenise(run.tokenizer, [words[index]], max_length=length, words=True)
            self._align(features[index], again.word_ids(0), rows[index])
        for index in sorted(set(range(len(rows))) - set(lost)):
            self._align(features[index], encoded.word_ids(index), rows[index])
        return features

    def _align(self, feature: Feature, word_ids: Sequence[int | None], row: Row) -> None:
        first = [w if w is not None and (i == 0 or w != word_ids[i - 1]) else None for i, w in enumerate(word_ids)]
        feature["scored"] = [int(word is not None) for word in first] or [0]
        tags = row.get("tags")
        if tags is not None:
            ids = [label_id(label_name(tag), self._ids) for tag in tags]
            feature["label"] = [IGNORED if word is None else ids[word] for word in first] or [IGNORED]

    def collate(self, run: Run, features: Sequence[Feature], rows: Sequence[int], random: RandomRows) -> Batch:
        """Pad to the longest; targets `[B, L]` with -100 where unscored, None unless every row is tagged."""
        inputs, masks = padded_inputs(run, features)
        side = run.tokenizer.padding_side
        scored = padded([feature["scored"] for feature in features], 0, side)
        labelled = all("label" in feature for feature in features)
        targets = padded([feature["label"] for feature in features], IGNORED, side) if labelled else None
        size = len(features)
        counts = {"rows": size, "all_rows": size, "episodes": 1, "tokens": int(scored.sum())}
        return Batch(inputs, targets, tuple(rows), {**masks, "scored": {"input_ids": scored}}, counts)

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        """Cross-entropy summed over scored tokens."""
        (out,) = ctx.outputs(batch, [view])
        return replace(out, terms=self.terms(out.logits, batch))

    def terms(
        self, logits: Tensor, batch: Batch, *, weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> dict[str, Term]:
        """The loss from logits `[B, L, C]`; `weight` `[C]` is a factor for each tag.

        Raises:
            DataError: if the batch is not tagged.
        """
        if batch.targets is None:
            raise DataError("these rows have no tags, so they have no loss")
        return token_terms(logits, batch, weight=weight, label_smoothing=label_smoothing)

    def predict(self, ctx: Context, batch: Batch, view: View) -> Prediction:
        """Probabilities `[B, L, C]`; where rows are tagged, the loss, and each row's share of it."""
        with torch.no_grad():
            (out,) = ctx.outputs(batch, [view])
            scores = out.scores.softmax(-1)
            if batch.targets is None:
                return Prediction(scores)
            return replace(token_prediction(out.scores, batch), scores=scores)

    def metrics(self, run: Run) -> SpanMetrics:
        """Fresh metrics."""
        return SpanMetrics(run.labels, run.config.evaluate.metric or self.metric)

    def records(self, run: Run, batch: Batch, prediction: Prediction, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Words, tags, predicted tags, and whether all of them are correct."""
        if prediction.scores is None:
            return
        lengths = [len(row["tokens"]) for row in rows]
        guesses = word_tags(prediction.scores.argmax(-1), batch.masks["scored"]["input_ids"], run.labels, lengths)
        for row, guess in zip(rows, guesses, strict=True):
            record: dict[str, Any] = {"tokens": list(row["tokens"])}
            if row.get("tags") is not None:
                tags = [label_name(tag) for tag in row["tags"]]
                record.update(label=tags, correct=tags == guess)
            yield {**record, "prediction": guess}


def _spaced(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Byte-level tokenizers (GPT2, RoBERTa) know words inside a text by the space before them."""
    splitter = str(getattr(tokenizer.backend_tokenizer, "pre_tokenizer", ""))
    space = " " if "ByteLevel" in splitter and "add_prefix_space=False" in splitter else ""
    return [space * (index > 0) + word for index, word in enumerate(words)]


def _lost(word_ids: Sequence[int | None], words: Sequence[str], truncated: bool) -> bool:
    """Whether some word before the cut has no piece."""
    found = {word for word in word_ids if word is not None}
    last = max(found, default=-1) + 1 if truncated else len(words)
    return len(found) < last


def _visible(tokenizer: Any, word: str) -> str:
    if tokenizer(word, add_special_tokens=False)["input_ids"]:
        return word
    return str(tokenizer.unk_token or tokenizer.eos_token)
