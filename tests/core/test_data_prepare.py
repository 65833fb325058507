"""From raw rows to the task's roles: inference, labels, bad rows, and the checks of whole splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.config import DataConfig
from hybridengine.data import Split, prepare_splits
from hybridengine.errors import DataError


@dataclass
class Roles:
    """As much of a task as the data room looks at."""

    columns: Mapping[str, str] = field(default_factory=lambda: {"text": "text", "label": "label"})
    optional_columns: Sequence[str] = ()

    def check_row(self, row: Mapping[str, Any]) -> str | None:
        if not all(isinstance(word, str) for word in row.get("tokens", ())):
            return "has tokens that are no words"
        if "tags" in row and len(row["tags"]) != len(row["tokens"]):
            return "has other numbers of tokens and tags"
        return None


PAIRS = Roles({"text": "text", "text_pair": "text_pair", "label": "label"}, ("text_pair",))
TAGS = Roles({"tokens": "tokens", "tags": "tags"})
GOOD = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]


def run(task: Any = None, data: dict[str, Any] | None = None, **splits: Any) -> tuple[dict[str, Split], dict[str, Any]]:
    named = {name: Split(name, rows, f"{name}.jsonl") for name, rows in splits.items()}
    return prepare_splits(DataConfig(**{"carve": {}, **(data or {})}), task or Roles(), named)


NASTY: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no text": (None, {"label": "a"}, "column 'text' is missing"),
    "no label": (None, {"text": "x"}, "column 'label' is missing"),
    "no column": (None, {}, "column 'text' is missing"),
    "null text": (None, {"text": None, "label": "a"}, "column 'text' is null"),
    "null label": (None, {"text": "x", "label": None}, "column 'label' is null"),
    "number as text": (None, {"text": 3, "label": "a"}, "must be text, not int"),
    "boolean as text": (None, {"text": True, "label": "a"}, "must be text, not bool"),
    "list as text": (None, {"text": ["x"], "label": "a"}, "must be text, not list"),
    "NaN as text": (None, {"text": float("nan"), "label": "a"}, "must be text, not float"),
    "bytes as text": (None, {"text": b"x", "label": "a"}, "must be text, not bytes"),
    "mapping as label": (None, {"text": "x", "label": {"a": 1}}, "must be a label, not dict"),
    "empty text": (None, {"text": "", "label": "a"}, "column 'text' is empty"),
    "blank text": (None, {"text": " \t\n\u3000\u00a0", "label": "a"}, "column 'text' is empty"),
    "zero-width text": (None, {"text": "\u200b\ufeff\u2060", "label": "a"}, "column 'text' is empty"),
    "control characters": (None, {"text": "\x01\x02\x1b", "label": "a"}, "column 'text' is empty"),
    "lone surrogate": (None, {"text": "a\ud800b", "label": "a"}, "lone surrogate"),
    "only a surrogate": (None, {"text": "\udfff", "label": "a"}, "lone surrogate"),
    "NUL": (None, {"text": "a\0b", "label": "a"}, "NUL character"),
    "10 MB": (None, {"text": "x" * 10_000_000, "label": "a"}, "longer than 1,000,000 characters"),
    "NaN label": (None, {"text": "x", "label": float("nan")}, "is nan, not a finite number"),
    "infinite label": (None, {"text": "x", "label": float("-inf")}, "is -inf, not a finite number"),
    "NaN among labels": (None, {"text": "x", "label": [0.0, float("nan")]}, "is nan"),
    "null among labels": (None, {"text": "x", "label": ["a", None]}, "holds a null"),
    "empty label": (None, {"text": "x", "label": " "}, "column 'label' is empty"),
    "surrogate label": (None, {"text": "x", "label": "a\udc00"}, "lone surrogate"),
    "empty second text": (PAIRS, {"text": "x", "text_pair": "", "label": "a"}, "column 'text_pair' is empty"),
    "text as tokens": (TAGS, {"tokens": "a b", "tags": ["O", "O"]}, "must be a list, not str"),
    "no tokens": (TAGS, {"tokens": [], "tags": []}, "column 'tokens' is empty"),
    "NUL in a token": (TAGS, {"tokens": ["a\0"], "tags": ["O"]}, "NUL character"),
    "null token": (TAGS, {"tokens": ["a", None], "tags": ["O", "O"]}, "holds a null"),
    "tags missing": (TAGS, {"tokens": ["a", "b"], "tags": ["O"]}, "other numbers of tokens and tags"),
}
USABLE = {
    "right-to-left marks": "abc \u202e def",
    "emoji": "\U0001f44d\U0001f3fd",
    "combining": "e\u0301" * 50,
    "one letter": "x",
    "Chinese": "很好",
    "markup": "<script>alert(1)</script>",
    "terminal escape": "\x1b[31mred",
    "long": "word " * 100_000,
}


def neighbours(task: Any) -> list[dict[str, Any]]:
    if task is TAGS:
        return [{"tokens": [f"w{i}", "x"], "tags": ["O", "B-a"]} for i in range(6)]
    return [{**row, "text_pair": "second"} for row in GOOD] if task is PAIRS else list(GOOD)


@pytest.mark.parametrize("case", NASTY)
def test_nasty_rows_are_refused_with_their_place_or_counted(case: str) -> None:
    task, row, message = NASTY[case]
    good = neighbours(task)
    rows = [*good[:3], row, *good[3:]]
    with pytest.raises(DataError) as caught:
        run(task, train=rows)
    assert "train.jsonl:4: " in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value)) < 1000, "the message must not repeat the row"
    splits, card = run(task, {"on_bad_row": "skip"}, train=rows)
    assert len(splits["train"]) == len(good)
    assert sum(card["skipped"]["train"].values()) == 1
    assert splits["train"].where(3) == "train.jsonl:5"


@pytest.mark.parametrize("case", USABLE)
def test_odd_but_usable_texts_pass_unchanged(case: str) -> None:
    splits, _ = run(train=[*GOOD, {"text": USABLE[case], "label": "a"}])
    assert splits["train"].rows[-1]["text"] == USABLE[case]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(JSON, JSON)
def test_any_value_is_used_or_counted(text: Any, label: Any) -> None:
    splits, card = run(data={"on_bad_row": "skip"}, train=[*GOOD, {"text": text, "label": label}])
    assert len(splits["train"]) + sum(card["skipped"].get("train", {}).values()) == len(GOOD) + 1


def test_errors_list_five_and_the_total() -> None:
    with pytest.raises(DataError) as caught:
        run(train=[*GOOD, *({"text": "", "label": "a"} for _ in range(9))])
    message = str(caught.value)
    assert message.startswith("9 of 29 train rows cannot be used:")
    assert message.count("train.jsonl:") == 5 and "and 4 more" in message and "on_bad_row: skip" in message


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (("text", "label", "id"), {"text": "text", "label": "label"}),
        (("review", "sentiment"), {"text": "review", "label": "sentiment"}),
        (("Sentence", "Label"), {"text": "Sentence", "label": "Label"}),
        (("phrase", "label"), {"text": "phrase", "label": "label"}),
        (("content", "category", "text"), {"text": "text", "label": "category"}),
    ],
)
def test_columns_are_inferred_where_unambiguous(columns: tuple[str, ...], found: dict[str, str]) -> None:
    rows = [{c: (i % 2 if c in ("label", "Label", "id") else f"{c} {i % 2}") for c in columns} for i in range(4)]
    _, card = run(train=rows)
    assert card["columns"]["train"] == found


def test_ambiguous_and_wrong_columns() -> None:
    with pytest.raises(
        DataError, match=r"several columns could be 'text': title, phrase.*columns found: title, phrase"
    ):
        run(train=[{"title": "a", "phrase": "b", "label": "x"}])
    with pytest.raises(DataError, match=r"no column 'label'.*columns found: text, stars.*data\.columns"):
        run(train=[{"text": "a", "stars": 3}])
    with pytest.raises(DataError, match=r"data\.columns\.text names column 'revew'.*Did you mean 'review'"):
        run(data={"columns": {"text": "revew"}}, train=[{"review": "a", "label": "x"}])
    with pytest.raises(DataError, match=r"data\.columns has 'txt'.*Did you mean 'text'"):
        run(data={"columns": {"txt": "title"}}, train=[{"title": "a", "phrase": "b", "story": "c", "label": "x"}])


def test_configured_columns_and_labels() -> None:
    rows = [{"a": f"t{i}", "b": i % 2, "c": "extra"} for i in range(4)]
    config = {"columns": {"text": "a", "label": "b", "title": "c"}, "labels": {"0": "bad", "1": "good"}}
    splits, _ = run(data=config, train=rows)
    assert splits["train"].rows[1] == {"text": "t1", "label": "good", "title": "extra"}
    with pytest.raises(DataError, match=r"train\.jsonl:1: label '0' is not listed in data\.labels"):
        run(data={**config, "labels": {"1": "good"}}, train=rows)


@pytest.mark.parametrize(("raw", "name"), [(True, "true"), (1, "1"), (1.0, "1"), ("1", "1")])
def test_raw_labels_of_any_type_map_by_name(raw: Any, name: str) -> None:
    rows = [{"text": "x", "label": raw}, {"text": "y", "label": "other"}]
    splits, _ = run(data={"labels": {name: "yes", "other": "no"}}, train=rows)
    assert [row["label"] for row in splits["train"].rows] == ["yes", "no"]


def test_whole_split_checks() -> None:
    with pytest.raises(DataError, match="no training split"):
        run(test=GOOD)
    with pytest.raises(DataError, match="the validation split holds no rows"):
        run(train=GOOD, validation=[])
    with pytest.raises(DataError, match="no usable row is left in the train split"):
        run(data={"on_bad_row": "skip"}, train=[{"text": "", "label": "a"}])
    with pytest.raises(DataError, match=r"all 3 training rows have the label 'a'"):
        run(train=[{"text": str(i), "label": "a"} for i in range(3)])
    with pytest.raises(DataError, match="unknown split 'dev'"):
        prepare_splits(DataConfig(), Roles(), {"train": Split("train", GOOD), "dev": Split("dev", GOOD)})


def test_label_that_training_lacks() -> None:
    test = [{"text": "p", "label": "a"}, {"text": "q", "label": "c"}]
    with pytest.raises(DataError, match=r"test\.jsonl:2: label 'c' of the test split does not occur in training"):
        run(train=GOOD, test=test)
    splits, card = run(data={"on_bad_row": "skip"}, train=GOOD, test=test)
    assert len(splits["test"]) == 1 and card["skipped"]["test"] == {"label that training lacks": 1}
    splits, _ = prepare_splits(
        DataConfig(carve={}), Roles(), {"train": Split("train", GOOD), "test": Split("test", test)}, episodic=True
    )
    assert len(splits["test"]) == 2, "few-shot test classes are new by design"


def test_whole_floats_are_classes_and_measurements_are_not() -> None:
    rows = [{"text": f"t{i}", "label": float(i % 2)} for i in range(8)]
    with pytest.raises(DataError, match="label '2' of the test split"):
        run(train=rows, test=[{"text": "x", "label": 2}])
    with pytest.raises(DataError, match="have the label '1'"):
        run(train=rows[1::2])
    measured = [{"text": f"t{i}", "label": i + 0.5} for i in range(8)]
    splits, _ = run(data={"carve": {"validation": 0.25}}, train=measured, test=[{"text": "x", "label": 4.0}])
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 2, "test": 1}


def test_missing_splits_are_carved_and_given_ones_stay() -> None:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(100)]
    splits, card = run(data={"carve": {"validation": 0.1, "test": 0.2}}, train=rows, test=rows[:4])
    assert {name: len(split) for name, split in splits.items()} == {"train": 90, "validation": 10, "test": 4}
    assert card["carved"] == {"validation": 0.1}
    # texts of a given split that also stand in training are told, not removed
    assert card["overlap"]["train/test"] + card["overlap"]["validation/test"] == 4


def test_unlabelled_rows_need_no_label_and_leak_none() -> None:
    splits, _ = run(train=GOOD, unlabelled=[{"text": "u", "label": "zzz"}, {"text": "v"}])
    assert list(splits["unlabelled"].rows) == [{"text": "u"}, {"text": "v"}]


def test_unlabelled_rows_are_checked_by_the_task() -> None:
    train = [{"tokens": ["a"], "tags": ["O"]}]
    with pytest.raises(DataError, match=r"unlabelled\.jsonl:2: has tokens that are no words"):
        run(TAGS, train=train, unlabelled=[{"tokens": ["u"]}, {"tokens": [1, 2]}])


def test_limit_is_told() -> None:
    splits, card = run(data={"limit": 8}, train=GOOD)
    assert len(splits["train"]) == 8 and card["limit"] == {"rows": 8, "of": 20}


def test_ids_and_origins() -> None:
    split = Split("train", GOOD, "a.csv", range(2, 22))
    assert split.where(0) == "a.csv:2" and Split("train", GOOD[:1], "", ["b.csv:9"]).where(0) == "b.csv:9"
    assert not set(split.ids(range(20))) & set(Split("test", GOOD).ids(range(20)))
    with pytest.raises(ValueError, match="20 rows but 1 line"):
        Split("train", GOOD, "a.csv", [1])
