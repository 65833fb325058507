"""Edited copies of texts under their labels: what all methods of data augmentation share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hybridengine.data.rows import Split
from hybridengine.errors import StackError
from hybridengine.seams.randomness import mix

if TYPE_CHECKING:
    from hybridengine.run import Run

__all__ = ["Rewrite", "add_copies", "rewrite_unlabelled"]

Rewrite = Callable[[Sequence[Mapping[str, Any]], Sequence[int]], Sequence[str]]
"""From rows and a random key for each to their new texts. A text must depend on its own row and key alone."""

_SHOWN = 60  # characters of a text in a note


def add_copies(
    run: Run, splits: Mapping[str, Split], name: str, copies: int, rewrite: Rewrite
) -> dict[str, Split] | None:
    """Append edited copies of the training texts, each under the label of its original.

    Originals stay first and unchanged. A copy is its original with another `text`, and with `augmented_from`, the
    original's position in the training split; errors about it name the original's place in its file. Copies that other
    methods have added are not copied again: the copies of several methods add up. All other splits stay.

    Keys are functions of (seed, name, row, copy) alone, so a copy depends neither on order nor on other rows.

    Args:
        name: of the method, in notes, errors and keys.
        copies: edited copies of each row; at 0 `rewrite` serves `rewrite_unlabelled` alone.

    Returns:
        The splits; None on a dry run and where a finished run is loaded, which need no copies.

    Raises:
        StackError: the task has no plain texts, or tags their words.
    """
    if run.dry or run.predicting:
        return None
    if "text" not in run.task.columns or "tags" in run.task.columns:
        raise StackError(
            f"{name} edits the role 'text', but this task reads {', '.join(run.task.columns)}: edited words would not "
            f"fit their tags. Remove {name} from methods."
        )
    run.rewrites[name] = rewrite
    if not copies:
        run.say(f"{name}: no copies; only unlabelled rows are rewritten, where another method asks for it")
        return None
    train = splits["train"]
    ids = train.ids(range(len(train)))
    origins = [i for i, row in enumerate(train.rows) if "augmented_from" not in row for _ in range(copies)]
    keys = [mix(run.seed, name, ids[i], number % copies) for number, i in enumerate(origins)]
    texts = rewrite([train.rows[i] for i in origins], keys)
    made = [{**train.rows[i], "text": text, "augmented_from": i} for i, text in zip(origins, texts, strict=True)]
    _tell(run, train, name, made)
    lines = [*train.lines, *(train.lines[i] for i in origins)]
    return {**splits, "train": replace(train, rows=[*train.rows, *made], lines=lines)}


def rewrite_unlabelled(run: Run, splits: Mapping[str, Split], asking: str) -> dict[str, Split]:
    """Add the split `augmented`: every unlabelled row as the methods before this one rewrite it, each in turn.

    Its row i is row i of `unlabelled`, and batches get both as parts, at the same positions. Where the split
    is there already, it stays.

    Args:
        asking: name of the method that asks, in errors.

    Raises:
        StackError: no method before it rewrites texts.
    """
    if "augmented" in splits:
        return dict(splits)
    if not run.rewrites:
        raise StackError(
            f"{asking} needs texts that another method rewrites before it; add eda, synonym, mask-infill or"
            f" back-translation, with a lower `order` than {asking} where one is set"
        )
    split = splits["unlabelled"]
    rows = [{**row, "augmented_from": i} for i, row in enumerate(split.rows)]
    ids = split.ids(range(len(split)))
    for name, rewrite in run.rewrites.items():
        texts = rewrite(rows, [mix(run.seed, name, row, 0) for row in ids])
        rows = [{**row, "text": text} for row, text in zip(rows, texts, strict=True)]
    return {**splits, "augmented": replace(split, name="augmented", rows=rows)}


def _tell(run: Run, train: Split, name: str, made: Sequence[Mapping[str, Any]]) -> None:
    """Say how many copies there are, how many of them were left as they are, and show one."""
    changed = [row for row in made if row["text"] != train.rows[row["augmented_from"]]["text"]]
    same = len(made) - len(changed)
    told = f", {same:,} of them unchanged (nothing in them could be edited)" if same else ""
    run.say(f"{name}: added {len(made):,} training rows{told}")
    if changed:
        row = changed[0]
        old, new = (_short(text) for text in (train.rows[row["augmented_from"]]["text"], row["text"]))
        run.say(f"{name}: for example {train.where(row['augmented_from'])}, {old!r} -> {new!r}")


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
