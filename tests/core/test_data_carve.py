"""Carving is stratified, leak-free, and independent of row order."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybridengine.data import Split
from hybridengine.data.carve import carve, limit_rows, text_key
from hybridengine.errors import DataError

INPUTS = ["text"]
ROWS = st.lists(
    st.fixed_dictionaries({"text": st.sampled_from([f"Text {i}" for i in range(60)]), "label": st.sampled_from("abc")}),
    min_size=8,
    max_size=80,
)
SHARES = st.fixed_dictionaries({"validation": st.floats(0.05, 0.45)}, optional={"test": st.floats(0.05, 0.45)})


def texts(split: Split) -> list[str]:
    return [text_key(row, INPUTS) for row in split.rows]


def content(split: Split) -> list[list[tuple[str, Any]]]:
    """The rows as a multiset: neither their order nor that of their columns matters."""
    return sorted(sorted(row.items()) for row in split.rows)


def carved(rows: list[dict[str, Any]], shares: dict[str, float]) -> dict[str, Split]:
    try:
        return carve(Split("train", rows), shares, INPUTS)
    except DataError:
        assume(False)
        raise


@settings(max_examples=150, deadline=None)
@given(ROWS, SHARES)
def test_partition_without_leaks(rows: list[dict[str, Any]], shares: dict[str, float]) -> None:
    out = carved(rows, shares)
    assert sorted(line for split in out.values() for line in split.lines) == list(range(1, len(rows) + 1))
    for split in out.values():
        assert [rows[line - 1] for line in split.lines] == list(split.rows)
    seen = [set(texts(split)) for split in out.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)), "a text stands in two splits"
    lost = {row["label"] for row in rows} - {row["label"] for row in out["train"].rows}
    assert not lost, "training lost a class"


@settings(max_examples=100, deadline=None)
@given(ROWS, SHARES, st.randoms(use_true_random=False))
def test_row_order_is_irrelevant(rows: list[dict[str, Any]], shares: dict[str, float], rng: random.Random) -> None:
    shuffled = list(rows)
    rng.shuffle(shuffled)
    first, second = carved(rows, shares), carved(shuffled, shares)
    for name in first:
        assert content(first[name]) == content(second[name])


@settings(max_examples=100, deadline=None)
@given(st.integers(10, 120), st.integers(0, 30), st.floats(0.1, 0.4))
def test_appended_rows_move_few(size: int, more: int, share: float) -> None:
    rows = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(size + more)]
    before = carved(rows[:size], {"validation": share})
    after = carved(rows, {"validation": share})
    old = {row["text"] for row in rows[:size]}
    moved = set(texts(before["validation"])) ^ (set(texts(after["validation"])) & old)
    assert len(moved) <= more  # each new text displaces at most one old one, or draws one in


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=2, max_size=5), st.floats(0.1, 0.5, exclude_max=True))
def test_stratified(sizes: list[int], share: float) -> None:
    rows = [{"text": f"{label} {i}", "label": str(label)} for label, size in enumerate(sizes) for i in range(size)]
    out = carved(rows, {"validation": share})
    counts = Counter(row["label"] for row in out["validation"].rows)
    quotas = {str(label): int(share * size + 0.5) for label, size in enumerate(sizes)}
    if sum(quotas.values()) == 0:
        assert all(counts[label] == 1 for label in quotas)
    else:
        assert all(counts[label] == min(quota, sizes[int(label)] - 1) for label, quota in quotas.items())


def test_case_and_white_space_are_one_text() -> None:
    rows = [{"text": variant, "label": "a"} for variant in ("A  good film", "a good film", "A GOOD\tFILM ")]
    rows += [{"text": f"other {i}", "label": "ab"[i % 2]} for i in range(30)]
    out = carve(Split("train", rows), {"validation": 0.3, "test": 0.3}, INPUTS)
    homes = {name for name, split in out.items() if "a good film" in texts(split)}
    assert len(homes) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), min_size=20, max_size=60))
def test_groups_stay_together(pairs: list[tuple[int, int]]) -> None:
    rows = [{"text": f"text {text}", "label": "a", "group": group} for text, group in pairs]
    out = carved(rows, {"validation": 0.3})
    homes: dict[str, set[str]] = defaultdict(set)
    for name, split in out.items():
        for row in split.rows:
            homes[f"g{row['group']}"].add(name)
            homes[f"t{row['text']}"].add(name)
    assert all(len(home) == 1 for home in homes.values())


def test_sets_of_labels_and_tags_keep_every_class_in_training() -> None:
    many = [
        {"text": f"row {i}", "label": sorted({"abcdef"[i % 6], "abcdef"[i * i % 5], "x" * (i % 7 + 1)})}
        for i in range(60)
    ]
    tags = [{"tokens": [f"w{i}"], "tags": ["B-rare" if i == 7 else "O"]} for i in range(20)]
    for rows, inputs, role in ((many, ["text"], "label"), (tags, ["tokens"], "tags")):
        out = carve(Split("train", rows), {"validation": 0.4}, inputs)
        everything = {label for row in rows for label in row[role]}
        assert {label for row in out["train"].rows for label in row[role]} == everything
        assert 0.25 <= len(out["validation"]) / len(rows) <= 0.5


def test_impossible_shares() -> None:
    rows = [{"text": "only one", "label": "a"}] * 5
    with pytest.raises(DataError, match=r"too few to carve a validation split.*data\.validation"):
        carve(Split("train", rows), {"validation": 0.1}, INPUTS)
    with pytest.raises(DataError, match="less than 1"):
        carve(Split("train", rows), {"validation": 0.5, "test": 0.5}, INPUTS)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 40), st.randoms(use_true_random=False))
def test_limit(rows: list[dict[str, Any]], limit: int, rng: random.Random) -> None:
    chosen = limit_rows(Split("train", rows), limit, INPUTS)
    assert len(chosen) == min(limit, len(rows))
    assert list(chosen.lines) == sorted(chosen.lines)
    shuffled = list(rows)
    rng.shuffle(shuffled)
    again = limit_rows(Split("train", shuffled), limit, INPUTS)
    assert content(again) == content(chosen)
    larger = limit_rows(Split("train", rows), limit + 3, INPUTS)
    assert set(chosen.lines) <= set(larger.lines), "a smaller limit is part of a larger one"


def test_limit_breaks_ties_by_content() -> None:
    rows = [{"text": "same", "label": label} for label in "abcdef"]
    chosen = [limit_rows(Split("train", order), 2, INPUTS) for order in (rows, rows[::-1])]
    assert content(chosen[0]) == content(chosen[1])
