"""Rows written anew into a run's cloze, and what its model says about some rows before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hybridengine.seams.randomness import permutation
from hybridengine.seams.task import Row
from hybridengine.seams.types import Batch
from hybridengine.text.label_words import AtMask
from hybridengine.text.tokens import usable_length

if TYPE_CHECKING:
    from hybridengine.run import Run

__all__ = ["batch_of", "rewritten", "some_rows", "survey"]


def batch_of(run: Run, rows: Sequence[Row], ids: Sequence[int], pieces: Sequence[Sequence[str]] | None = None) -> Batch:
    """Rows as a batch on the run's device: in its cloze where it has one, else as its task writes them.

    Args:
        pieces: another template for each row (`pieces_of`).
    """
    features = run.cloze.features(run, rows, pieces) if run.cloze else run.task.features(run, rows)
    made: Batch = run.task.collate(run, run.finish_features(features), ids, run.random)
    return made.to(run.device)


def rewritten(run: Run, batch: Batch, pieces: Sequence[Sequence[str]], rows: Sequence[Row] | None = None) -> Batch:
    """The batch with its rows in other templates; targets, counts and parts stay.

    Args:
        pieces: a template for each row.
        rows: the rows with further columns that the templates name; by default as the data has them.
    """
    rows = run.rows_of(batch.rows) if rows is None else rows
    features = run.cloze.encode(rows, usable_length(run), pieces)
    made: Batch = run.task.collate(run, run.finish_features(features), batch.rows, run.random).to(run.device)
    return replace(batch, inputs=made.inputs, masks=made.masks)


def some_rows(run: Run, most: int, *key: object) -> list[Row]:
    """At most so many training rows with a label, chosen by seed and key."""
    labelled = [row for row in run.splits["train"].rows if row.get("label") is not None]
    chosen = sorted(permutation(len(labelled), run.seed, *key)[:most])
    return [labelled[i] for i in chosen]


@torch.no_grad()
def survey(run: Run, rows: Sequence[Row], pieces: Sequence[str] | None = None) -> Iterator[tuple[AtMask, Batch]]:
    """What the run's model, as it is, says at the masks of some rows: batch by batch.

    For `on_run_start`, where there is no context yet; the model is in evaluation mode while a batch is made.
    """
    size = run.config.evaluate.batch_size
    training = run.model.training
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        own = None if pieces is None else [pieces] * len(part)
        batch = batch_of(run, part, range(start, start + len(part)), own)
        run.model.eval()
        try:
            with run.precision.autocast(run.device):
                logits = run.model(**batch.inputs).logits
        finally:
            run.model.train(training)
        yield run.cloze.at_mask(logits, batch), batch
