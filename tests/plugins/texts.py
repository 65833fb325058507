"""A run that has texts and no model, and what every method that copies texts must keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from hybridengine.errors import StackError
from hybridengine.plugin import Run, Split
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.testing import tiny_config


class Roles:
    """The roles of a task, which is all that these methods ask of it."""

    def __init__(self, **columns: str) -> None:
        self.columns: Mapping[str, str] = columns


def make_run(seed: int = 0, **columns: str) -> Run:
    run = Run(tiny_config(seed=seed), torch.device("cpu"), Precision("fp32", None), LossScale(1.0))
    run.task = Roles(**(columns or {"text": "text", "label": "label"}))
    return run


def splits_of(texts: Sequence[str]) -> dict[str, Split]:
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    return {"train": Split("train", rows, "a.csv", range(2, len(rows) + 2)), "validation": Split("validation", rows)}


def transform(method: Any, texts: Sequence[str], seed: int = 0) -> dict[str, Split]:
    out = method.transform_data(make_run(seed), splits_of(texts))
    assert out is not None
    return out


def check_copies(make: Callable[[int], Any], texts: Sequence[str], copies: int, seed: int) -> list[str]:
    """Originals first and unchanged, copies traceable and labelled, evaluation rows untouched, all reproducible."""
    before, out = splits_of(texts), transform(make(copies), texts, seed)
    train, original = out["train"], before["train"]
    assert list(train.rows[: len(texts)]) == list(original.rows), "originals stay first and unchanged"
    assert len(train) == len(texts) * (1 + copies)
    for index in range(len(texts), len(train)):
        row = train.rows[index]
        source = row["augmented_from"]
        assert source == (index - len(texts)) // copies
        assert {**row, "text": ""} == {**original.rows[source], "text": "", "augmented_from": source}
        assert train.where(index) == original.where(source)
        assert row["text"].strip()
    assert list(out["validation"].rows) == list(before["validation"].rows)
    assert list(transform(make(copies), texts, seed)["train"].rows) == list(train.rows)
    return [row["text"] for row in train.rows[len(texts) :]]


def check_alone_and_keyed(make: Callable[[int], Any], text: str) -> None:
    """A copy depends neither on order nor on other rows, but on seed, row and copy."""
    alone = transform(make(2), [text])["train"].rows[1:]
    among = transform(make(2), [text, "some other words", "and more of them"])["train"].rows[3:5]
    assert [row["text"] for row in alone] == [row["text"] for row in among]
    assert len({transform(make(1), [text], seed)["train"].rows[1]["text"] for seed in range(8)}) > 1
    assert len({row["text"] for row in transform(make(8), [text])["train"].rows[1:]}) > 1
    repeated = transform(make(1), [text] * 8)["train"].rows[8:]
    assert len({row["text"] for row in repeated}) > 1, "each row has numbers of its own"


def check_refusals(make: Callable[[int], Any], name: str) -> None:
    """Tagged words are refused; dry and predicting runs, which need no copies, are left alone."""
    with pytest.raises(StackError, match=rf"reads tokens, tags.*Remove {name}"):
        make(1).transform_data(make_run(tokens="tokens", tags="tags"), splits_of(["a b"]))
    for kind in ("dry", "predicting"):
        run = make_run()
        setattr(run, kind, True)
        assert make(1).transform_data(run, splits_of(["a b"])) is None and not run.notes
    assert "text" in make(1).traits.requires
