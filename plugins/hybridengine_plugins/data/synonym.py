"""Synonym replacement: copies of the training texts in other words."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hybridengine.data import Synonyms, read_synonyms
from hybridengine.plugin import Run, Split, Traits, hook, parameter
from hybridengine.text import add_copies, cased_like, edits, replaced, words_of

__all__ = ["Synonym", "with_synonyms"]


@dataclass(eq=False)
class Synonym:
    """Add copies of each training text, under its label, in which words are replaced by synonyms.

    Of a text of l words, n = max(1, ⌊αl⌋) different ones, drawn with equal chance among those that have synonyms and
    are no stop words, are each replaced by a synonym. The file lists synonyms best first; the k-th of the first
    `candidates` is drawn with a chance proportional to q^k (q is `decay`; 1 makes all alike). Zhang et al. draw the
    number of words geometrically too; here it is fixed, as in EDA, so that α says how much changes. Case, punctuation
    and white space stay. English function words, negations among them, are stop words.

    Only the role `text` of training rows is edited, never labels, tags, summaries or other columns. Originals stay
    first and unchanged; a copy carries `augmented_from`, the position of its original, and that row's origin. Draws are
    keyed by (seed, row, copy). Words are looked up as they are written, so inflected forms need an entry (PPDB has
    them, WordNet has not), and one sense is not told from another.

    Paper: Zhang, Zhao, LeCun 2015, "Character-level Convolutional Networks for Text Classification", section 2.4
    (geometric choice by rank); Wei & Zou 2019 (α). Hooks: `transform_data`. Cost: (1 + copies) times the training rows
    per epoch. Combines with other augmentation, whose copies add up.
    """

    traits: ClassVar[Traits] = Traits(
        family="data",
        requires=("text",),
        provides=("augmentation",),
        cost="(1 + copies) x the training rows per epoch",
        paper="Zhang et al. 2015, arXiv:1509.01626",
        combines="classification of texts; eda, mask-infill, back-translation; not token tags",
    )

    path: str = parameter(
        help="synonyms: WordNet's folder (index.noun, data.noun, ...), a PPDB file, two columns, or JSONL",
        min_length=1,
        example="ppdb-2.0-s-lexical.gz",
    )
    alpha: float = parameter(0.1, "share of the words that is replaced", ge=0, le=1)
    copies: int = parameter(1, "edited copies per row; 0 where only `uda` or `self-training` needs them", ge=0)
    candidates: int = parameter(5, "best synonyms of a word that are drawn from", ge=1)
    decay: float = parameter(0.5, "how much less likely each next synonym is", gt=0, le=1)

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Append the copies to the training split."""

        def rewrite(rows: Sequence[Mapping[str, Any]], keys: Sequence[int]) -> list[str]:
            table = read_synonyms(self.path)
            best = {word: others[: self.candidates] for word, others in table.items()}
            pairs = zip(rows, keys, strict=True)
            return [with_synonyms(row["text"], self.alpha, best, self.decay, random.Random(key)) for row, key in pairs]

        return add_copies(run, splits, "synonym", self.copies, rewrite)


def with_synonyms(text: str, alpha: float, synonyms: Synonyms, decay: float, rng: random.Random) -> str:
    """The text with max(1, ⌊αl⌋) of its l words replaced, fewer where fewer have synonyms; none at α = 0.

    Args:
        synonyms: lower-cased word to replacements, best first.
        decay: chance of each next replacement relative to the one before.
        rng: drawn from by `random()` alone, whose stream Python keeps stable.
    """
    words = words_of(text)
    known = [word for word in words if not word.is_stop_word and word.core.lower() in synonyms]
    changes = []
    for _ in range(min(edits(alpha, len(words)), len(known))):
        word = known.pop(int(rng.random() * len(known)))
        changes.append((word, cased_like(word.core, _pick(synonyms[word.core.lower()], decay, rng))))
    return replaced(text, changes)


def _pick(choices: Sequence[str], decay: float, rng: random.Random) -> str:
    """The k-th choice with a chance proportional to decay^k."""
    weights = [decay**rank for rank in range(len(choices))]
    left = rng.random() * sum(weights)
    for choice, weight in zip(choices, weights, strict=True):
        left -= weight
        if left < 0:
            return choice
    return choices[-1]  # rounding
