"""Demonstrations: every row is shown with a solved training row of each class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch

from hybridengine.data import label_name
from hybridengine.errors import ConfigError, DataError
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Batch, Context, KeyedRows, Out, Prediction, View, mix, permutation, wide
from hybridengine.text import WordSimilarity, rewritten, solved, usable_length

__all__ = ["Demonstrations"]

Texts = tuple[str, ...]
"""The texts of a row, in the order of the template's columns."""


class Pool:
    """Training texts of each class that can be shown, `[C][n]`, and which of them are eligible beside a query."""

    def __init__(self, texts: Sequence[Sequence[Sequence[str]]], nearest: float) -> None:
        self._texts: list[list[Texts]] = [[tuple(row) for row in group] for group in texts]
        self._similarity = WordSimilarity([" ".join(row) for group in self._texts for row in group])
        self._nearest = nearest
        self.eligible = lru_cache(4096)(self._eligible)

    def _eligible(self, query: Texts) -> list[list[tuple[float, int, Texts]]]:
        """For each class, nearest first: how near a row is, the class, and its texts; never the query's own."""
        near = iter(self._similarity.to(" ".join(query)))
        found = []
        for label, group in enumerate(self._texts):
            rows = [(next(near), label, texts) for texts in group]
            others = sorted((row for row in rows if row[2] != query), key=lambda row: -row[0])
            found.append(others[: math.ceil(self._nearest * len(others))])
        return found

    def drawn(self, query: Texts, key: tuple[object, ...]) -> list[tuple[int, Texts]]:
        """One row of each class, the most similar first: its class and its texts."""
        groups = self.eligible(query)
        chance = KeyedRows(key, [mix(query)]).uniform(len(groups))[0].tolist()
        rows = [group[int(u * len(group))] for group, u in zip(groups, chance, strict=True)]
        return [(label, texts) for _, label, texts in sorted(rows, key=lambda row: -row[0])]


@dataclass(eq=False)
class Demonstrations:
    """Writes one solved example of each class beside every row, chosen among training rows like it.

    Maths: T(x) is the template with a mask, T(x, y) the same with the first label word of y in the mask's place; a row
    becomes T(x) ⊕ T(x_1, y_1) ⊕ ... with one row of each class (in front of T(x) for a causal model), the most similar
    one next to the query. Of a class's rows the `nearest` share is eligible, by the cosine of TF-IDF vectors of their
    words, where the paper asks a second model for embeddings of sentences; never a row with the query's own texts.
    Among these chance decides, keyed by seed, text and draw. Training draws anew at each step; a prediction is the mean
    of the probabilities under `contexts` draws. Demonstrations take at most `share` of a row.

    Paper: Gao, Fisch, Chen 2021, "Making Pre-trained Language Models Better Few-shot Learners" (LM-BFF), section 6.
    Hooks: `on_run_start`, `transform_batch`, `wrap_loss`, `wrap_predict`. Cost: longer rows; `contexts` passes for each
    row that is predicted. Combines with everything that `template` combines with, but pet.
    """

    traits: ClassVar[Traits] = Traits(
        family="prompts",
        order=Band.TERM + 1,  # after those that find the words
        requires=("cloze", "labels"),
        conflicts={"pet": "both write each row in their own way; remove one of the two"},
        effect="shown",
        cost="longer rows in training; predicting takes `contexts` passes over them",
        paper="Gao et al. 2021, arXiv:2012.15723",
        combines="template (needed) and what it combines with, few-shot, calibration; not pet",
    )

    contexts: int = parameter(4, "draws whose predictions are averaged", ge=1)
    nearest: float = parameter(0.5, "share of a class's rows, the most similar ones, that are eligible", gt=0, le=1)
    share: float = parameter(0.5, "share of a row that all demonstrations together may take", gt=0, lt=1)
    pool: int = parameter(64, "training rows of each class among which is chosen; kept in `best/`", ge=2)
    _pool: Pool = field(default_factory=lambda: Pool([], 1.0), init=False, repr=False)
    _room: int = field(default=0, init=False, repr=False)  # tokens for each text of a demonstration

    @hook
    def on_run_start(self, run: Run) -> None:
        """Choose the rows that can be shown.

        Raises:
            DataError: a class has only one text.
            ConfigError: the template has no words to fill in, or rows are too short.
        """
        if run.dry:
            return
        if run.cloze.words is None:
            raise ConfigError("demonstrations: there are no label words to fill in; add `verbalizer` to template")
        memory = run.memory("demonstrations")
        if not memory:
            memory["pool"] = [self._chosen(run, name) for name in run.labels]
        self._pool, self._room = Pool(memory["pool"], self.nearest), self._fitting(run)

    def _chosen(self, run: Run, label: str) -> list[Texts]:
        rows = [row for row in run.splits["train"].rows if row.get("label") is not None]
        found = (_texts(run, row) for row in rows if label_name(row["label"]) == label)
        texts = list(dict.fromkeys(found))
        if len(texts) < 2:
            raise DataError(
                f"demonstrations: class {label!r} has a single training text, beside which no other of its class could"
                " be shown; add rows, or remove demonstrations"
            )
        chosen = permutation(len(texts), run.seed, "demonstrations", label)[: self.pool]
        return [texts[i] for i in sorted(chosen)]

    def _fitting(self, run: Run) -> int:
        """How many tokens a text of a demonstration may have."""

        def literal(pieces: Sequence[str]) -> int:
            text = "".join(piece for piece in pieces if piece[0] != "{")
            return len(run.tokenizer(text, add_special_tokens=False)["input_ids"])

        limit, cloze = usable_length(run), run.cloze
        longer = max(literal(cloze.beside([solved(cloze.pieces, words[0], "")])) for words in cloze.words.texts)
        own = longer - literal(cloze.pieces)
        room = (int(self.share * limit) // len(run.labels) - own) // len(cloze.columns)
        if room < 1:
            raise ConfigError(
                f"demonstrations: {len(run.labels)} of them, {own} tokens long without their texts, do not fit into"
                f" {self.share:.0%} of {limit} tokens; raise `train.max_length`, or remove demonstrations"
            )
        return room

    # ---- rows ------------------------------------------------------------------------------------------------------

    def _written(self, run: Run, batch: Batch, *draw: object) -> Batch:
        """The batch with demonstrations; which they are depends on seed, draw and text alone."""
        rows, pieces = [], []
        for row in run.rows_of(batch.rows):
            drawn = self._pool.drawn(_texts(run, row), (run.seed, "demonstrations", *draw))
            others, added = [], dict(row)
            for number, (label, texts) in enumerate(drawn):
                mark = f"shown_{number}_"
                others.append(solved(run.cloze.pieces, run.cloze.words.texts[label][0], mark))
                pairs = zip(run.cloze.columns, texts, strict=True)
                added |= {mark + column: self._cut(run, text) for column, text in pairs}
            rows.append(added)
            pieces.append(run.cloze.beside(others))
        return rewritten(run, batch, pieces, rows)

    def _cut(self, run: Run, text: str) -> str:
        ends = run.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(ends) <= self._room else text[: ends[self._room - 1][1]]

    @hook
    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        """Rows with demonstrations, other ones at each step; unlabelled rows likewise."""
        parts = {name: self._written(run, part, "step", run.step) for name, part in batch.parts.items()}
        counts = {**batch.counts, "demonstrations": len(run.labels) * batch.size}
        return replace(self._written(run, batch, "step", run.step), parts=parts, counts=counts)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss; how many demonstrations stand beside a row is reported."""
        if "demonstrations" in batch.counts:
            ctx.report(self, shown=batch.counts["demonstrations"] / batch.counts["rows"])
        return inner(ctx, batch, view)

    @hook
    def wrap_predict(self, inner: Callable[..., Prediction], ctx: Context, batch: Batch, view: View) -> Prediction:
        """The mean of the predictions under several draws."""
        draws = [self._written(ctx.run, batch, "context", k) for k in range(self.contexts)]
        found = [inner(ctx, draw, view).scores for draw in draws]
        scores = torch.stack([wide(one) for one in found if one is not None]).mean(0)
        terms = {} if batch.targets is None else ctx.run.task.terms(scores.log(), batch)
        return Prediction(scores, terms=terms)


def _texts(run: Any, row: Any) -> Texts:
    return tuple(str(row[column]) for column in run.cloze.columns)
