"""The data plugin `vader-reviews` on archives made here, and on the real one where it is at hand."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.errors import DataError
from hybridengine.testing import tiny_config
from hybridengine_plugins.data.vader_reviews import VaderReviews, read_ratings, recipe

MOVIES, PRODUCTS = "movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt"
FILES = {
    MOVIES: "1\t2.5\tA joy.\r\n2\t0.9\tMeh.\r\n3\t-3.0\tA bore.",
    PRODUCTS: "\ufeff1_1\t1.5\ta JOY.\r\n1_2\t-1\tBroke.",
}


def archive(files: dict[str, str], inner: str = "v/additional_resources/hutto_ICWSM_2014.tar.gz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as zipped:
        zipped.writestr(inner, packed.getvalue())
    return outer.getvalue()


def test_reads_both_members_with_origins() -> None:
    ratings = read_ratings(archive(FILES))
    assert ratings == [
        (f"{MOVIES}:1", 2.5, "A joy."),
        (f"{MOVIES}:2", 0.9, "Meh."),
        (f"{MOVIES}:3", -3.0, "A bore."),
        (f"{PRODUCTS}:1", 1.5, "a JOY."),
        (f"{PRODUCTS}:2", -1.0, "Broke."),
    ]
    splits, dropped = recipe(ratings, "x.zip")
    rows = {row["text"]: row["label"] for split in splits.values() for row in split.rows}
    assert rows == {"A joy.": "positive", "A bore.": "negative", "Broke.": "negative"}
    assert dropped == {"read": 5, "undecided": 1, "duplicate": 1}


RATINGS = st.lists(st.tuples(st.floats(-4, 4), st.sampled_from([f"Text {i}" for i in range(99)])), max_size=60)


@settings(max_examples=60, deadline=None)
@given(RATINGS)
def test_recipe(pairs: list[tuple[float, str]]) -> None:
    splits, dropped = recipe([(f"m:{i}", rating, text) for i, (rating, text) in enumerate(pairs)], "x")
    kept = [(row["text"], row["label"], name) for name, split in splits.items() for row in split.rows]
    assert len(kept) + dropped["undecided"] + dropped["duplicate"] == len(pairs) == dropped["read"]
    assert len({text.lower() for text, _, _ in kept}) == len(kept)
    first = {text.lower(): rating for rating, text in reversed(pairs) if abs(rating) >= 1}
    for text, label, name in kept:
        assert label == ("positive" if first[text.lower()] > 0 else "negative")
        digit = int.from_bytes(hashlib.sha1(text.lower().encode()).digest(), "big") % 10
        assert name == ("validation" if digit == 0 else "test" if digit == 1 else "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive({MOVIES: FILES[MOVIES]}), f"no member {PRODUCTS}"),
        (archive(FILES, "v/other.tar.gz"), "no member additional_resources"),
        (archive({**FILES, MOVIES: "1\t2.5\tone\r\n2\tno number\ttwo"}), f"{MOVIES}:2: expected id, rating and text"),
        (archive({**FILES, MOVIES: "1\t2.5"}), f"{MOVIES}:1: expected id, rating and text, got 2 fields"),
        (b"PK nonsense", "damaged"),
        (archive(FILES)[:200], "damaged"),
    ],
)
def test_damaged_archives(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_ratings(content)


def test_checksum_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "vaderSentiment-0.5.zip"
    with pytest.raises(DataError, match=r"cannot be read \(No such file.*pip download"):
        VaderReviews(str(path)).build_data(None)  # type: ignore[arg-type]
    path.write_bytes(archive(FILES))
    with pytest.raises(DataError, match="not the archive this recipe was written for"):
        VaderReviews(str(path)).build_data(None)  # type: ignore[arg-type]


REAL = os.environ.get("HYBRIDENGINE_VADER_ARCHIVE", "")


@pytest.mark.skipif(not REAL, reason="set HYBRIDENGINE_VADER_ARCHIVE to the downloaded vaderSentiment-0.5.zip")
def test_real_archive() -> None:
    from hybridengine.building import initial_run

    run = initial_run(tiny_config())
    splits = VaderReviews(REAL).build_data(run)
    assert {name: len(split) for name, split in splits.items()} == {"train": 9297, "validation": 1177, "test": 1143}
    labels = Counter(row["label"] for split in splits.values() for row in split.rows)
    assert labels == {"positive": 6105, "negative": 5512}
    assert "vader-reviews: dropped 2,685 sentences with |rating| < 1 and 11 duplicates of 14,313" in run.notes
