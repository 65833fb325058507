"""Synonym replacement: which words, by which synonyms, how many, and what stays."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import check_alone_and_keyed, check_copies, check_refusals, make_run, splits_of

from hybridengine.data import read_rows, read_synonyms
from hybridengine_plugins.data.eda import EDA
from hybridengine_plugins.data.few_shot import FewShot
from hybridengine_plugins.data.synonym import Synonym, with_synonyms

SYNONYMS = {"good": ["fine", "great"], "film": ["movie"], "not": ["never"], "very": ["truly"]}
TEXTS = st.lists(
    st.sampled_from(["Good", "GOOD!", "film,", "bad", "(film)", "not", "Very", "...", "很好"]), min_size=1, max_size=12
)
DATA = next((p / "shared/data" for p in Path(__file__).resolve().parents if (p / "shared/data").is_dir()), Path())
REAL = [DATA / name / "synonyms.jsonl.gz" for name in ("wordnet", "ppdb_synonyms")]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("synonyms") / "s.tsv"
    path.write_text("".join(f"{a}\t{b}\n" for a, others in SYNONYMS.items() for b in others), encoding="utf-8")
    return str(path)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS.map(" ".join), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 9))
def test_invariants(table: str, texts: list[str], copies: int, seed: int) -> None:
    check_copies(lambda count: Synonym(table, 0.4, count), texts, copies, seed)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([" ", "  ", "\n\t"]), st.floats(0, 1), st.integers(0, 10_000))
def test_replaces_so_many_words_that_are_no_stop_words(words: list[str], gap: str, alpha: float, seed: int) -> None:
    text = gap.join(words)
    out = with_synonyms(text, alpha, SYNONYMS, 0.5, random.Random(seed))
    pairs = list(zip(words, out.split(gap), strict=True))  # white space stays
    changed = [(a, b) for a, b in pairs if a != b]
    known = sum(word.strip("(),!").lower() in ("good", "film") for word in words)
    assert len(changed) == min(max(1, math.floor(alpha * len(words))) if alpha else 0, known)
    allowed = {
        "Good": {"Fine", "Great"},
        "GOOD!": {"FINE!", "GREAT!"},
        "film,": {"movie,"},
        "(film)": {"(movie)"},
    }
    assert all(b in allowed[a] for a, b in changed), "case and punctuation stay"


def test_words_are_alike_and_synonyms_fall_geometrically() -> None:
    choices = {"a1": ["x", "y", "z"], "b1": ["w"]}
    drawn = Counter(with_synonyms("a1 b1", 0.5, choices, 0.5, random.Random(seed)) for seed in range(7000))
    # Half of the texts lose each word; x, y, z have weights 1, 1/2, 1/4, hence 4/7, 2/7, 1/7 of 3,500. The standard
    # deviation of each count is below sqrt(7000 / 4) = 42; five of them
    wanted = {"a1 w": 3500, "x b1": 2000, "y b1": 1000, "z b1": 500}
    assert drawn.keys() == wanted.keys()
    assert all(abs(drawn[text] - count) < 210 for text, count in wanted.items()), drawn


def test_alone_and_keyed(table: str) -> None:
    check_alone_and_keyed(lambda copies: Synonym(table, 0.5, copies, decay=1.0), "a good film and one more good film")


def test_only_the_best_candidates_are_drawn(table: str) -> None:
    made = check_copies(lambda count: Synonym(table, 1.0, count, candidates=1), ["a good film"], 20, 0)
    assert set(made) == {"a fine movie"}


def test_other_columns_that_hold_labels_stay(table: str) -> None:
    run, splits = make_run(text="text", summary="summary"), splits_of([])
    splits["train"] = type(splits["train"])("train", [{"text": "good film", "summary": "good film", "label": "good"}])
    out = Synonym(table, 1.0).transform_data(run, splits)
    assert out is not None
    assert {k: v for k, v in out["train"].rows[1].items() if k != "text"} == {
        "summary": "good film",
        "label": "good",
        "augmented_from": 0,
    }


def test_copies_of_several_methods_add_up(table: str) -> None:
    """Each copies the originals alone, so that every copy names an original, and the number is a sum."""
    run, splits = make_run(), splits_of(["a good film", "a bad film"] * 3)
    splits["train"].rows[0]["augmented"] = "a column of the user's own"
    for method in (FewShot(2), EDA(copies=2), Synonym(table, 1.0, 3)):
        splits = method.transform_data(run, splits) or splits
    rows = splits["train"].rows
    assert len(rows) == 4 * (1 + 2 + 3)
    assert [row.get("augmented_from") for row in rows] == [
        *[None] * 4,
        *(i for i in range(4) for _ in range(2)),
        *(i for i in range(4) for _ in range(3)),
    ]
    assert [row["label"] for row in rows[4:]] == [rows[row["augmented_from"]]["label"] for row in rows[4:]]


def test_says_how_many_and_shows_one(table: str) -> None:
    run = make_run()
    Synonym(table, 1.0, 2).transform_data(run, splits_of(["nothing known", "a Good film"]))
    assert run.notes[0].startswith("synonym: added 4 training rows, 2 of them unchanged")
    assert run.notes[1].startswith("synonym: for example a.csv:3, 'a Good film' -> 'a ")


def test_refusals(table: str) -> None:
    check_refusals(lambda copies: Synonym(table, copies=copies), "synonym")


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.parent.name)
def test_on_a_real_table(path: Path) -> None:
    if not path.is_file():
        pytest.skip(f"the table {path.parent.name} is not in shared/data beside a folder above the repository")
    table = read_synonyms(path)
    assert len(table) > 10_000
    assert set(table["film"]) == {x for _, row in read_rows(path) if row["word"] == "film" for x in row["synonyms"]}
    text = "The Film was not good, but its story is remarkable."
    made = {with_synonyms(text, 0.3, table, 0.5, random.Random(seed)) for seed in range(30)}
    assert len(made) > 5 and text not in made
    for out in made:
        assert out.startswith("The ") and " was not " in out and out.endswith(".")
        changed = [(a, b) for a, b in zip(text.split(" "), out.split(" "), strict=True) if a != b]
        assert len(changed) == 3
        for old, new in changed:
            assert new.strip(",.").lower() in {x.lower() for x in table[old.strip(",.").lower()]}
            assert new[:1].isupper() == old[:1].isupper()


def test_the_method_reads_any_of_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"word": "Good", "synonyms": ["fine"]}) + "\n", encoding="utf-8")
    assert check_copies(lambda count: Synonym(str(path), 1.0, count), ["good film"], 1, 0) == ["fine film"]
