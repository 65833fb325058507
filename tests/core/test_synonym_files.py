"""Synonyms as WordNet, PPDB and plain tables write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from hybridengine.data import read_synonyms
from hybridengine.errors import DataError

LICENCE = (
    "  1 This software and database is being provided to you, the LICENSEE, by  \n  2 Princeton University ...  \n"
)
# Lines of WordNet 3.0's files, shortened: offset, file, type, words in hexadecimal, pointers | gloss.
DATA_ADJ = (
    LICENCE + "01123148 00 a 01 good 0 003 ! 01125429 a 0101 | having desirable qualities\n"
    "00064787 00 s 03 estimable 0 good 3 honorable(p) 1 000 | deserving of esteem\n"
    "01586752 00 s 04 dear 0 good 4 near 0 close_at_hand 0 000 | with or in a close relationship\n"
)
INDEX_ADJ = (
    LICENCE + "close_at_hand a 1 0 1 0 01586752  \n"
    "good a 3 2 ! & 3 2 01123148 01586752 00064787  \n"
    "honorable a 1 0 1 0 00064787  \n"
    "near a 1 0 1 0 01586752  \n"
)
DATA_NOUN = LICENCE + "05159725 07 n 02 good 0 goodness 1 000 | moral excellence\n"
INDEX_NOUN = LICENCE + "good n 1 1 @ 1 1 05159725  \ngoodness n 1 0 1 0 05159725  \n"


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return folder


def test_wordnet_by_sense_noun_before_adjective(tmp_path: Path) -> None:
    write(tmp_path, data_adj=DATA_ADJ, index_adj=INDEX_ADJ, data_noun=DATA_NOUN, index_noun=INDEX_NOUN)
    assert read_synonyms(tmp_path) == {
        "good": ["goodness", "dear", "near", "estimable", "honorable"],  # no marker (p), no words of several parts
        "goodness": ["good"],
        "honorable": ["estimable", "good"],
        "near": ["dear", "good"],
    }


def test_damaged_wordnet_is_refused_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither index\.noun and data\.noun"):
        read_synonyms(tmp_path)
    write(tmp_path, data_adj=DATA_ADJ.replace("01586752 00 s", "01586759 00 s"), index_adj=INDEX_ADJ)
    with pytest.raises(DataError, match=r"index\.adj:3: .*data\.adj lacks"):
        read_synonyms(tmp_path)
    write(tmp_path, data_adj=LICENCE + "01123148 00 a zz good 0\n")
    with pytest.raises(DataError, match=r"data\.adj:3: not a synset"):
        read_synonyms(tmp_path)


def test_ppdb_by_score_without_opposites_and_phrases(tmp_path: Path) -> None:
    lines = [
        "[JJ] ||| good ||| decent ||| PPDB2.0Score=4.1 PPDB1.0Score=3.2 ||| 0-0 ||| Equivalence",
        "[JJ] ||| Good ||| Fine ||| PPDB2.0Score=5.25 PPDB1.0Score=1 ||| 0-0 ||| ReverseEntailment",
        "[JJ] ||| good ||| bad ||| PPDB2.0Score=5.9 PPDB1.0Score=3.2 ||| 0-0 ||| Exclusion",
        "[JJ] ||| good ||| very nice ||| PPDB2.0Score=5.8 ||| 0-0 0-1 ||| Equivalence",
        "[JJ] ||| good ||| book ||| PPDB2.0Score=5.8 ||| 0-0 ||| OtherRelated",
    ]
    path = tmp_path / "ppdb-2.0-s-lexical.gz"  # as it is published: no suffix but .gz
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    assert read_synonyms(path) == {"good": ["Fine", "decent"]}
    old = tmp_path / "ppdb-1.0-s-lexical"
    old.write_text("[NN] ||| film ||| movie ||| p(e|f)=1.2 ||| 0-0\n[NN] ||| film ||| picture ||| p=1 ||| 0-0\n")
    assert read_synonyms(old) == {"film": ["movie", "picture"]}
    old.write_text("[NN] ||| film ||| movie ||| p(e|f)=1.2 ||| 0-0\n\n[NN] ||| film\n")
    with pytest.raises(DataError, match=r"lexical:3: 2 fields, expected LHS"):
        read_synonyms(old)


def test_two_columns_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("Good\tfine\ngood\tgood\n\ngood\tgreat\nfilm\tmoving picture\n", encoding="utf-8")
    assert read_synonyms(path) == {"good": ["fine", "great"], "film": ["moving picture"]}
    path.write_text("good\tfine\ngood great\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs\.tsv:2: expected WordNet's folder"):
        read_synonyms(path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"word": "good", "synonyms": ["fine"]}) + '\n{"word": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: expected"):
        read_synonyms(rows)
    rows.write_text(json.dumps({"word": "good", "synonyms": ["Good"]}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no synonyms"):
        read_synonyms(rows)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_synonyms(tmp_path / "none.tsv")
    path = tmp_path / "cut.gz"
    path.write_bytes(gzip.compress(b"good\tfine\n" * 99)[:-9])
    with pytest.raises(DataError, match="damaged gzip"):
        read_synonyms(path)
