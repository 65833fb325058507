"""Copies of texts, rewritten unlabelled rows, and the helping models that may make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridengine.data import Split
from hybridengine.errors import ModelError, StackError
from hybridengine.model import load_frozen
from hybridengine.run import Run
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.testing import tiny_bert, tiny_checkpoint, tiny_config, tiny_tokenizer
from hybridengine.text import add_copies, longest_input, rewrite_unlabelled


def run_of() -> Run:
    run = Run(tiny_config(), torch.device("cpu"), Precision("fp32", None), LossScale(1.0))
    run.task = SimpleNamespace(columns={"text": "text", "label": "label"})
    return run


def keyed(rows: Sequence[Mapping[str, Any]], keys: Sequence[int]) -> list[str]:
    """The text and its key."""
    return [f"{row['text']} {key}" for row, key in zip(rows, keys, strict=True)]


def splits_of() -> dict[str, Split]:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    return {"train": Split("train", rows, "t.csv"), "unlabelled": Split("unlabelled", [{"text": "u"}] * 3, "u.csv")}


def test_each_copy_has_a_key_of_its_own_and_names_its_original() -> None:
    run, splits = run_of(), splits_of()
    once = add_copies(run, splits, "one", 2, keyed)
    twice = add_copies(run, once or {}, "two", 1, keyed)
    assert once is not None and twice is not None
    rows = twice["train"].rows
    assert [row.get("augmented_from") for row in rows] == [None, None, 0, 0, 1, 1, 0, 1]
    assert [row["label"] for row in rows] == [1, 2, 1, 1, 2, 2, 1, 2]
    assert len({row["text"] for row in rows}) == 8
    assert [twice["train"].where(i) for i in (2, 4, 7)] == ["t.csv:1", "t.csv:2", "t.csv:2"]
    assert list(run.rewrites) == ["one", "two"] and twice["unlabelled"] is splits["unlabelled"]


def test_texts_that_stay_are_counted_and_long_ones_are_shown_in_part() -> None:
    run, splits = run_of(), splits_of()
    splits["train"] = Split("train", [{"text": "x" * 99}, {"text": "y"}])
    add_copies(run, splits, "m", 1, lambda rows, keys: ["z", "y"])
    assert run.notes == [
        "m: added 2 training rows, 1 of them unchanged (nothing in them could be edited)",
        f"m: for example rows:1, '{'x' * 60}...' -> 'z'",
    ]


def test_unlabelled_rows_go_through_all_methods_in_turn() -> None:
    run, splits = run_of(), splits_of()
    assert add_copies(run, splits, "none", 0, keyed) is None and "no copies" in run.notes[0]
    add_copies(run, splits, "shout", 1, lambda rows, keys: [row["text"].upper() + "!" for row in rows])
    out = rewrite_unlabelled(run, splits, "asking")
    texts = [row["text"] for row in out["augmented"].rows]
    assert len(set(texts)) == 3 and all(text.startswith("U ") and text.endswith("!") for text in texts)
    assert [out["augmented"].where(i) for i in range(3)] == ["u.csv:1", "u.csv:2", "u.csv:3"]
    assert rewrite_unlabelled(run, out, "another")["augmented"] is out["augmented"]
    run.rewrites.clear()
    with pytest.raises(StackError, match=r"asking needs texts .* add eda"):
        rewrite_unlabelled(run, splits, "asking")


def test_a_helping_model_is_frozen_and_complete(tmp_path: Path) -> None:
    folder = str(tiny_checkpoint(tmp_path / "mlm", "bert", "AutoModelForMaskedLM", hidden_dropout_prob=0.5))
    model, tokenizer = load_frozen("AutoModelForMaskedLM", folder, torch.device("cpu"), key="mine.model")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert longest_input(tokenizer, model) == 64
    with pytest.raises(ModelError, match=r"mine\.model: .*has no weights for .*give one that was"):
        load_frozen("AutoModelForSequenceClassification", folder, torch.device("cpu"), key="mine.model")
    with pytest.raises(ModelError, match=r"mine\.model: the folder .* does not exist"):
        load_frozen("AutoModelForMaskedLM", str(tmp_path / "none"), torch.device("cpu"), key="mine.model")


def test_the_longest_input_is_the_smaller_limit() -> None:
    assert longest_input(tiny_tokenizer(max_length=20), tiny_bert()) == 20
    assert longest_input(tiny_tokenizer(max_length=10**30), tiny_bert(max_position_embeddings=50)) == 50
    assert longest_input(tiny_tokenizer(max_length=10**30), SimpleNamespace(config=None)) is None
