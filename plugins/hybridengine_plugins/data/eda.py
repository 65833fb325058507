"""EDA: easy data augmentation of the training texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hybridengine.data import Synonyms, read_synonyms
from hybridengine.plugin import Run, Split, Traits, hook, parameter
from hybridengine.text import add_copies, cased_like, edits, replaced, words_of

__all__ = ["EDA", "augment"]


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
    original in the training split, and that row's origin. Only the role `text` of the training split is edited, and
    copies that other methods made are not copied again.

    Randomness is keyed by (seed, row, copy), so it depends neither on order nor on other rows.

    Paper: Wei & Zou 2019, EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification
    Tasks. Helps most with few rows (the paper: α 0.05 and 16 copies at 500 rows, α 0.1 and 4 copies at full size).
    Hooks: `transform_data`. Cost: (1 + copies) times the training rows per epoch.
    """

    traits: ClassVar[Traits] = Traits(
        family="data",
        requires=("text",),
        provides=("augmentation",),
        cost="(1 + copies) x the training rows per epoch",
        paper="Wei & Zou 2019",
        combines="classification of texts; not token tags (words move)",
    )

    alpha: float = parameter(0.1, "share of the words that is edited", ge=0, le=1)
    copies: int = parameter(1, "edited copies per row; 0 where only `uda` or `self-training` needs them", ge=0)
    synonyms: str | None = parameter(
        None, "file of synonyms: JSONL, PPDB, two columns, or WordNet's folder; see `synonym`"
    )

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Append the copies to the training split."""

        def rewrite(rows: Sequence[Mapping[str, Any]], keys: Sequence[int]) -> list[str]:
            synonyms = read_synonyms(self.synonyms) if self.synonyms else {}
            pairs = zip(rows, keys, strict=True)
            return [augment(row["text"], self.alpha, synonyms, random.Random(key)) for row, key in pairs]

        out = add_copies(run, splits, "eda", self.copies, rewrite)
        if out is not None and not self.synonyms:
            run.say("eda: swaps and deletes words only; set synonyms to a file to replace and insert words too")
        return out


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
    count = edits(alpha, len(words))
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
    places = [i for i, word in enumerate(words_of(" ".join(words))) if _known(word.core, synonyms)]
    for _ in range(min(count, len(places))):
        place = places.pop(_below(len(places), rng))
        (word,) = words_of(words[place])
        words[place] = replaced(words[place], [(word, cased_like(word.core, _pick(word.core, synonyms, rng)))])
    return words


def _insert(words: list[str], count: int, synonyms: Synonyms, rng: random.Random) -> list[str]:
    known = [word.core for word in words_of(" ".join(words)) if _known(word.core, synonyms)]
    for _ in range(count if known else 0):
        word = _pick(known[_below(len(known), rng)], synonyms, rng)
        words.insert(_below(len(words) + 1, rng), word)
    return words


def _known(core: str, synonyms: Synonyms) -> bool:
    return core.lower() in synonyms


def _pick(core: str, synonyms: Synonyms, rng: random.Random) -> str:
    choices = synonyms[core.lower()]
    return choices[_below(len(choices), rng)]
