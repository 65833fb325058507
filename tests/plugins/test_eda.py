"""EDA's invariants: labels stay, evaluation rows stay, nothing becomes empty, everything is reproducible."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import check_alone_and_keyed, check_copies, check_refusals, make_run, splits_of

from hybridengine.errors import DataError
from hybridengine_plugins.data.eda import EDA, augment

SYNONYMS = {"good": ["fine", "great"], "film": ["movie"]}
TEXTS = st.lists(st.sampled_from(["Good", "film,", "bad", "(film)", "x", "the", "很好"]), min_size=1, max_size=12).map(
    " ".join
)


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=8), st.floats(0, 1), st.integers(1, 3), st.integers(0, 9))
def test_invariants(texts: list[str], alpha: float, copies: int, seed: int) -> None:
    made = check_copies(lambda count: EDA(alpha, count), texts, copies, seed)
    for index, text in enumerate(made):
        known = Counter(texts[index // copies].split())
        assert not Counter(text.split()) - known, "swaps and deletions add no word"


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.integers(0, 99))
def test_alpha_zero_changes_nothing(text: str, seed: int) -> None:
    odd = "  " + text.replace(" ", "  ")
    assert augment(odd, 0.0, SYNONYMS, random.Random(seed)) == odd


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.floats(0.01, 1), st.integers(0, 10_000))
def test_one_operation_with_n_edits(text: str, alpha: float, seed: int) -> None:
    words = text.split()
    out = augment(text, alpha, SYNONYMS, random.Random(seed)).split()
    count = max(1, int(alpha * len(words)))
    allowed = {"fine", "great", "movie"}
    if len(out) > len(words):  # insertion: the text with n synonyms of its words
        assert len(out) - len(words) == count
        assert all(word in allowed for word in (Counter(out) - Counter(words)).elements())
        rest = iter(out)
        assert all(word in rest for word in words), "insertion keeps the order"
    elif len(out) < len(words):  # deletion keeps the order
        rest = iter(words)
        assert all(word in rest for word in out)
    elif Counter(out) != Counter(words):  # replacement, in place
        changed = [(a, b) for a, b in zip(words, out, strict=True) if a != b]
        known = sum(word.strip("(),").lower() in SYNONYMS for word in words)
        assert len(changed) == min(count, known)
        pairs = {"Good": {"Fine", "Great"}, "film,": {"movie,"}, "(film)": {"(movie)"}}
        assert all(b in pairs[a] for a, b in changed), "case and punctuation stay"
    else:  # swap
        assert sum(a != b for a, b in zip(words, out, strict=True)) <= 2 * count


def test_all_four_operations_occur() -> None:
    text = "a good film , and one more good film for the two of us"
    words = text.split()
    kinds: Counter[str] = Counter()
    for seed in range(400):
        out = augment(text, 0.2, SYNONYMS, random.Random(seed)).split()
        if len(out) != len(words):
            kinds["insert" if len(out) > len(words) else "delete"] += 1
        else:
            kinds["swap" if Counter(out) == Counter(words) else "replace"] += 1
    # each is binomial(400, 1/4): mean 100, standard deviation 8.7; deletion of no word (3%) and
    # swaps of equal words count as swaps; 55..145 is five standard deviations
    assert all(55 <= kinds[kind] <= 145 for kind in ("insert", "delete", "swap", "replace")), kinds


def test_share_of_deleted_words_is_alpha() -> None:
    words = [f"w{i}" for i in range(50)]
    kept = [
        len(out) for s in range(2000) if len(out := augment(" ".join(words), 0.3, {}, random.Random(s)).split()) < 50
    ]
    # about 1,000 deletions of binomial(50, 0.7): mean 35, standard error 3.24 / sqrt(1000) = 0.10; five of them
    assert abs(sum(kept) / len(kept) - 35) < 0.52


def test_independent_of_other_rows_and_keyed_by_seed() -> None:
    check_alone_and_keyed(lambda copies: EDA(0.3, copies), "one two three four five six seven eight")


def test_synonyms_file(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"word": "Good", "synonyms": ["fine", "good"]}) + "\n")
        file.write(json.dumps({"word": "bad", "synonyms": []}) + "\n")
    run = make_run()
    out = EDA(0.5, 20, str(path)).transform_data(run, splits_of(["bad good good bad"]))
    assert out is not None
    words = {word for row in out["train"].rows for word in row["text"].split()}
    assert words == {"bad", "good", "fine"}
    assert not any("set synonyms" in note for note in run.notes)
    (tmp_path / "b.jsonl").write_text('{"word": "a", "synonyms": ["b"]}\n{"word": "a", "synonyms": "b"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: expected"):
        EDA(synonyms=str(tmp_path / "b.jsonl")).transform_data(make_run(), splits_of(["a"]))


def test_says_what_it_did_and_what_it_left_out() -> None:
    run = make_run()
    EDA(copies=2).transform_data(run, splits_of(["word", "two words here"]))
    assert run.notes[0].startswith("eda: added 4 training rows, ") and "unchanged" in run.notes[0]
    assert "set synonyms" in run.notes[1]


def test_refuses_tags_and_rests_on_the_dry_run() -> None:
    check_refusals(lambda copies: EDA(copies=copies), "eda")
