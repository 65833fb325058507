"""The card's numbers against independent counts."""

from __future__ import annotations

import json
import statistics
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.data import Split, add_token_lengths, card_lines
from hybridengine.data.card import data_card

WORDS = st.lists(st.sampled_from(["good", "Good", "bad", "film"]), min_size=1, max_size=4).map(" ".join)
ROWS = st.lists(st.fixed_dictionaries({"text": WORDS, "label": st.sampled_from("ab")}), min_size=1, max_size=25)


@settings(max_examples=80, deadline=None)
@given(ROWS, ROWS)
def test_counts(train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    card = data_card({"train": Split("train", train), "test": Split("test", test)}, ["text"])
    described = card["splits"]["train"]
    texts = [row["text"].lower() for row in train]
    assert described["rows"] == len(train)
    assert described["labels"] == {x: n for x in "ab" if (n := sum(row["label"] == x for row in train))}
    assert described["duplicates"] == sum(text in texts[:i] for i, text in enumerate(texts))
    assert card["overlap"] == {"train/test": sum(row["text"].lower() in texts for row in test)}
    lengths = [len(text.split()) for text in texts]
    assert described["words"]["median"] == statistics.median_low(lengths)
    assert described["words"]["max"] == max(lengths)
    # nearest rank: the smallest value that at least 95% of the rows do not exceed
    p95 = described["words"]["p95"]
    assert sum(n <= p95 for n in lengths) >= 0.95 * len(lengths)
    assert all(sum(m <= n for m in lengths) < 0.95 * len(lengths) for n in lengths if n < p95)
    assert json.loads(json.dumps(card)) == card


def test_sources() -> None:
    joined = Split("train", [{"text": "x"}] * 3, "", ["a.csv:1", "a.csv:2", "b.csv:1"])
    card = data_card({"train": joined, "test": Split("test", [{"text": "y"}], "c.csv")}, ["text"])
    assert card["source"] == "a.csv and 1 more, c.csv"


def test_the_digest_tells_texts_labels_and_order() -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    others = [rows[::-1], rows[:1], [rows[0], {"text": "b", "label": "x"}], [rows[0], {"text": "B", "label": "y"}]]

    def digest(rows: list[dict[str, Any]]) -> str:
        return str(data_card({"train": Split("train", rows)}, ["text"])["splits"]["train"]["digest"])

    assert digest(rows) == digest([dict(reversed(row.items())) for row in rows])
    assert len({digest(other) for other in [rows, *others]}) == 5


def test_token_lengths() -> None:
    card = data_card({"train": Split("train", [{"text": "a b"}] * 4)}, ["text"])
    cut = {"train": [False, False, True, True], "absent": [False]}
    add_token_lengths(card, {"train": [4, 7, 8, 8], "absent": [1]}, cut, 8)
    assert card["splits"]["train"]["tokens"] == {"median": 7, "p95": 8, "max": 8, "truncated": 0.5}
    assert any("50.0% cut at 8" in line for line in card_lines(card))


def test_lines_tell_everything_and_carry_no_control_characters() -> None:
    rows = [{"text": "很好 film", "label": "\x1b[31mred"}, {"text": "很好 FILM", "label": "b"}]
    card = data_card({"train": Split("train", rows, "a.csv"), "test": Split("test", rows)}, ["text"])
    assert card["splits"]["train"]["words"]["max"] == 3  # two Chinese characters and a word
    card.update(skipped={"train": {"empty": 3}}, carved={"validation": 0.1}, carve_rule="by hash")
    card.update(limit={"rows": 2, "of": 9}, inferred={"train": {"text": "review"}})
    shown = "\n".join(card_lines(card))
    assert "\x1b" not in shown
    for part in (
        "train: 2 rows of a.csv",
        "1 rows repeat a text",
        "2 rows of test have a text that train holds too",
        "skipped 3 train rows: empty (3)",
        "validation is 10% of the training texts",
        "limited to 2 of 9 rows",
        "read text from column 'review'",
    ):
        assert part in shown
