"""Words of a text, and tokens drawn by given numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.text import by_length, cased_like, edits, replaced, sample_top_k, words_of

TEXTS = st.text(alphabet="aB'-., \n好é1_", max_size=30)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_words_are_what_white_space_parts_without_punctuation_around(text: str) -> None:
    words = words_of(text)
    assert len(words) == len(text.split())
    for word, whole in zip(words, text.split(), strict=True):
        assert text[word.start : word.end] == word.core
        assert word.core in whole
        assert not word.core or (word.core[0].isalnum() or word.core[0] == "_")
    assert replaced(text, [(word, word.core) for word in words]) == text
    gone = replaced(text, [(word, "") for word in words])
    assert not any(character.isalnum() for word in words if word.core for character in gone.replace(" ", ""))


def test_words_and_stop_words() -> None:
    words = words_of('He said: "Don’t" ... (well-known) X2')
    assert [word.core for word in words] == ["He", "said", "Don’t", "", "well-known", "X2"]
    assert [word.is_stop_word for word in words] == [True, False, True, True, False, False]
    assert replaced("a (b) c", [(words_of("a (b) c")[i], "xx") for i in (2, 1)]) == "a (xx) xx"


def test_case_follows_the_word_that_is_replaced() -> None:
    pairs = {("Good", "fine"): "Fine", ("GOOD", "fine"): "FINE", ("good", "fine"): "fine", ("good", "Paris"): "Paris"}
    pairs |= {("I", "we"): "We", ("", "x"): "x"}
    assert {pair: cased_like(*pair) for pair in pairs} == pairs


def test_edits() -> None:
    assert [edits(share, 7) for share in (0.0, 0.01, 0.3, 0.5, 1.0)] == [0, 1, 2, 3, 7]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=5, max_size=5), min_size=1, max_size=4),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 7),
    st.floats(0.2, 3),
)
def test_draws_invert_the_distribution(rows: list[list[float]], u: float, k: int, temperature: float) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    drawn = sample_top_k(logits, torch.full((len(rows),), u), k, temperature=temperature)
    for row, token in zip(rows, drawn.tolist(), strict=True):
        order = sorted(range(5), key=lambda i: -row[i])[: min(k, 5)]
        assert row[token] in [row[i] for i in order]
        p = torch.tensor([row[i] / temperature for i in order]).double().softmax(0)
        rank = [row[i] for i in order].index(row[token])  # of equal logits any may come
        ties = sum(row[i] == row[token] for i in order)
        before, after = float(p[:rank].sum()), float(p[: rank + ties].sum())
        assert before - 1e-9 <= torch.tensor(u).item() <= after + 1e-9


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_tokens_of_minus_infinity_are_never_drawn(u: float) -> None:
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0]])
    for k in (1, 2, 3, 4, 9):
        assert sample_top_k(logits, torch.tensor([u]).double(), k).item() in ((1,) if k == 1 else (1, 3))


def test_batches_of_similar_length_hold_every_text_once() -> None:
    batches = list(by_length(["aaa", "b", "cc", "dddd", "e"], 2))
    assert batches == [[1, 4], [2, 0], [3]]
    assert list(by_length([], 2)) == []
