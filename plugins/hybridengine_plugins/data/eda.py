"""EDA: easy data augmentation of the training texts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hybridengine.data import read_rows
from hybridengine.errors import DataError, StackError
from hybridengine.plugin import Run, Split, Traits, hook, parameter
from hybridengine.seams import mix

__all__ = ["EDA", "augment"]

Synonyms = Mapping[str, Sequence[str]]
_CORE = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)


@dataclass(eq=False)
class EDA:
    """Add edited copies of each training text, under its label.

    Each copy of a text of l words (split at white space) undergoes one operation, drawn with equal chance, with
    n = max(1, ⌊αl⌋) edits, none for α = 0:

    - synonym replacement: n different words that have synonyms are replaced by one of them;
    - random insertion: n times a synonym of a word of the text is inserted anywhere;
    - random swap: n times two words change places;
    - random deletion: each word is deleted with chance α; one word always stays.

    The first two need `synonyms`; without it they are left out, and the run says so. Case and punctuation around a
    replaced word stay. Originals stay first and unchanged; a copy carries `augmented_from`, the position of its
    original in the training split, and that row's origin. Only the role `text` of the training split is edited.

    Randomness is keyed by (seed, row, copy), so it depends neither on order nor on other rows.

    Paper: Wei & Zou 2019, EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification
    Tasks. Helps most with few rows (the paper: α 0.05 and 16 copies at 500 rows, α 0.1 and 4 copies at full size).
    Hooks: `transform_data`. Cost: (1 + copies) times the training rows per epoch.
    """

    traits: ClassVar[Traits] = Traits(
        family="data",
        requires=("text",),
        cost="(1 + copies) x the training rows per epoch",
        paper="Wei & Zou 2019",
        combines="classification of texts; not token tags (words move)",
    )

    alpha: float = parameter(0.1, "share of the words that is edited", ge=0, le=1)
    copies: int = parameter(1, "edited copies per row", ge=1)
    synonyms: str | None = parameter(None, 'path of a JSONL(.gz) file with rows {"word": ..., "synonyms": [...]}')

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Append the copies to the training split."""
        if run.dry:
            return None
        if "text" not in run.task.columns or "tags" in run.task.columns:
            raise StackError(
                f"eda edits the role 'text', but this task reads {', '.join(run.task.columns)}: edited words would not "
                "fit their tags. Remove eda from methods."
            )
        train = splits["train"]
        synonyms = _read_synonyms(self.synonyms) if self.synonyms else {}
        rows, lines, unchanged = list(train.rows), list(train.lines), 0
        for position, (row, key) in enumerate(zip(train.rows, train.ids(range(len(train))), strict=True)):
            for copy in range(self.copies):
                rng = random.Random(mix(run.seed, "eda", key, copy))
                text = augment(row["text"], self.alpha, synonyms, rng)
                unchanged += text == row["text"]
                rows.append({**row, "text": text, "augmented_from": position})
                lines.append(train.lines[position])
        self._say(run, len(rows) - len(train), unchanged)
        return {**splits, "train": Split("train", rows, train.source, lines)}

    def _say(self, run: Run, added: int, unchanged: int) -> None:
        same = f", {unchanged:,} of them unchanged (too short, or alpha is 0)" if unchanged else ""
        run.say(f"eda: added {added:,} training rows{same}")
        if not self.synonyms:
            run.say("eda: swaps and deletes words only; set synonyms to a file to replace and insert words too")


def augment(text: str, alpha: float, synonyms: Synonyms, rng: random.Random) -> str:
    """One edited copy of a text; the text itself where no edit applies.

    Args:
        text: not empty.
        alpha: share of the words that is edited.
        synonyms: lower-cased word to replacements; empty leaves out replacement and insertion.
        rng: drawn from by `random()` alone, whose stream Python keeps stable.

    Returns:
        Edited words joined by single spaces; never empty.
    """
    words = text.split()
    count = max(1, int(alpha * len(words))) if alpha > 0 else 0
    operations: list[Callable[[list[str]], list[str]]] = [
        lambda w: _swap(w, count, rng),
        lambda w: _delete(w, alpha, rng),
    ]
    if synonyms:
        operations.append(lambda w: _replace(w, count, synonyms, rng))
        operations.append(lambda w: _insert(w, count, synonyms, rng))
    edited = operations[_below(len(operations), rng)](list(words))
    return text if edited == words else " ".join(edited)


def _below(limit: int, rng: random.Random) -> int:
    return int(rng.random() * limit)


def _swap(words: list[str], count: int, rng: random.Random) -> list[str]:
    for _ in range(count if len(words) > 1 else 0):
        first = _below(len(words), rng)
        second = (first + 1 + _below(len(words) - 1, rng)) % len(words)
        words[first], words[second] = words[second], words[first]
    return words


def _delete(words: list[str], alpha: float, rng: random.Random) -> list[str]:
    kept = [word for word in words if rng.random() >= alpha]
    return kept or [words[_below(len(words), rng)]]


def _replace(words: list[str], count: int, synonyms: Synonyms, rng: random.Random) -> list[str]:
    places = [i for i, word in enumerate(words) if _known(word, synonyms)]
    for _ in range(min(count, len(places))):
        place = places.pop(_below(len(places), rng))
        before, core, after = _parts(words[place])
        words[place] = before + _like(core, _pick(core, synonyms, rng)) + after
    return words


def _insert(words: list[str], count: int, synonyms: Synonyms, rng: random.Random) -> list[str]:
    known = [core for word in words if _known(word, synonyms) for core in [_parts(word)[1]]]
    for _ in range(count if known else 0):
        word = _pick(known[_below(len(known), rng)], synonyms, rng)
        words.insert(_below(len(words) + 1, rng), word)
    return words


def _parts(word: str) -> tuple[str, str, str]:
    """Punctuation before, the word, punctuation after."""
    before, core, after = _CORE.fullmatch(word).groups()  # type: ignore[union-attr]
    return before, core, after


def _known(word: str, synonyms: Synonyms) -> bool:
    return _parts(word)[1].lower() in synonyms


def _pick(core: str, synonyms: Synonyms, rng: random.Random) -> str:
    choices = synonyms[core.lower()]
    return choices[_below(len(choices), rng)]


def _like(model: str, word: str) -> str:
    """The word with the initial capital of the one it replaces."""
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def _read_synonyms(path: str) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for number, row in read_rows(path):
        word, others = row.get("word"), row.get("synonyms")
        if not isinstance(word, str) or not isinstance(others, list) or not all(_is_word(x) for x in others):
            raise DataError(f'{path}:{number}: expected {{"word": "good", "synonyms": ["fine", ...]}}')
        known = table.setdefault(word.lower(), [])
        known.extend(x for x in others if x.lower() != word.lower() and x not in known)
    return {word: others for word, others in table.items() if others}


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
