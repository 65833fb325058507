"""Synonyms from files as they are published: WordNet's database, PPDB, two columns, or rows of words and lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridengine.data.reading import read_lines, read_rows
from hybridengine.errors import DataError

__all__ = ["Synonyms", "read_synonyms"]

Synonyms = Mapping[str, Sequence[str]]
"""Lower-cased word to its replacements, best first."""

_FORMATS = (
    "expected WordNet's folder (index.noun, data.noun, ...), a PPDB file (fields separated by |||), two columns"
    ' separated by a tab, or JSONL rows {"word": "good", "synonyms": ["fine", ...]}'
)
_POS = ("noun", "verb", "adj", "adv")
_NO_SYNONYMS = frozenset({"Exclusion", "Independent", "OtherRelated"})  # PPDB 2.0 lists opposites too
_SCORE = re.compile(r"PPDB2\.0Score=(-?[\d.]+)")
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective may stand

Entry = tuple[str, Sequence[str]]


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Read a table of synonyms; the format is told by the content.

    - A folder with WordNet's database files `index.POS` and `data.POS`: words of one synset, the most frequent sense
      first, for nouns, verbs, adjectives and adverbs in turn. Words of several parts are left out.
    - A PPDB file: lines `LHS ||| PHRASE ||| PARAPHRASE ||| FEATURES ||| ALIGNMENT ||| ENTAILMENT`, single words only,
      by falling `PPDB2.0Score` where there is one; pairs that are said to be opposites or unrelated are left out.
    - Two columns: a word, a tab, a replacement; a word may have several lines.
    - JSONL: rows `{"word": ..., "synonyms": [...]}`.

    Each file may be gzipped.

    Raises:
        DataError: the file is none of these, or holds no synonyms.
    """
    path = Path(path).expanduser()
    table: dict[str, list[str]] = {}
    for word, others in _wordnet(path) if path.is_dir() else _entries(path):
        known = table.setdefault(word.lower(), [])
        known.extend(other for other in others if other.lower() != word.lower() and other not in known)
    table = {word: others for word, others in table.items() if others}
    if not table:
        raise DataError(f"{path}: holds no synonyms; {_FORMATS}")
    return table


def _entries(path: Path) -> Iterator[Entry]:
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    if first.lstrip().startswith("{"):
        return _jsonl(path)
    return _ppdb(path) if "|||" in first else _columns(path)


def _jsonl(path: Path) -> Iterator[Entry]:
    for number, row in read_rows(path):
        word, others = row.get("word"), row.get("synonyms")
        if not isinstance(word, str) or not isinstance(others, list) or not all(_is_word(x) for x in others):
            raise DataError(f'{path}:{number}: expected {{"word": "good", "synonyms": ["fine", ...]}}')
        yield word, others


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _columns(path: Path) -> Iterator[Entry]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 2 or not all(fields):
            raise DataError(f"{path}:{number}: {_FORMATS}")
        yield fields[0], fields[1:]


def _ppdb(path: Path) -> Iterator[Entry]:
    scored = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("|||")]
        if len(fields) < 5 or not all(fields[1:3]):
            raise DataError(
                f"{path}:{number}: {len(fields)} fields, expected LHS ||| PHRASE ||| PARAPHRASE ||| FEATURES |||"
                " ALIGNMENT, and ENTAILMENT in PPDB 2.0; take the file as it was published"
            )
        score = _SCORE.search(fields[3])
        if not (len(fields) > 5 and fields[5] in _NO_SYNONYMS) and not any(" " in field for field in fields[1:3]):
            scored.append((-float(score[1]) if score else 0.0, fields[1], fields[2]))
    scored.sort(key=lambda entry: entry[0])  # stable: files without scores keep their order
    return ((word, [other]) for _, word, other in scored)


# ---- WordNet ---------------------------------------------------------------------------------------------------------


def _wordnet(folder: Path) -> Iterator[Entry]:
    present = [pos for pos in _POS if (folder / f"index.{pos}").is_file() and (folder / f"data.{pos}").is_file()]
    if not present:
        raise DataError(f"{folder}: holds neither index.noun and data.noun nor those of verb, adj or adv; {_FORMATS}")
    for pos in present:
        path = folder / f"index.{pos}"
        synsets = dict(_synsets(folder / f"data.{pos}"))
        for number, fields in _records(path):
            # lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt synset_offset [synset_offset...]
            try:
                offsets = fields[-int(fields[2]) :]
                members = [synsets[offset] for offset in offsets]
            except (IndexError, ValueError, KeyError):
                raise DataError(
                    f"{path}:{number}: not an entry of WordNet's index, or one that data.{pos} lacks"
                ) from None
            if "_" not in fields[0]:
                yield fields[0], [word for synset in members for word in synset]


def _synsets(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Byte offset as written, and the single words of each synset."""
    for number, fields in _records(path):
        # synset_offset lex_filenum ss_type w_cnt word lex_id [word lex_id...] p_cnt [ptr...] ... | gloss
        try:
            count = int(fields[3], 16)
            words = [_MARKER.sub("", word) for word in fields[4 : 4 + 2 * count : 2]]
        except (IndexError, ValueError):
            raise DataError(f"{path}:{number}: not a synset of WordNet's database") from None
        yield fields[0], [word for word in words if "_" not in word]


def _records(path: Path) -> Iterable[tuple[int, list[str]]]:
    """Lines of a database file, split at spaces; the licence at the top is indented."""
    return ((number, line.split()) for number, line in read_lines(path) if line.strip() and not line.startswith("  "))
