"""Words of a text: where they stand, which carry meaning, and how another takes the place of one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["STOP_WORDS", "Word", "cased_like", "edits", "replaced", "words_of"]

STOP_WORDS = frozenset(
    "a about above after again against all am an and any are aren't as at be because been before being below between"
    " both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each few for from"
    " further had hadn't has hasn't have haven't having he her here hers herself him himself his how i i'm if in into"
    " is isn't it it's its itself just me more most mustn't my myself never no nobody none nor not nothing now of off"
    " on once only or other our ours ourselves out over own same shan't she should shouldn't so some such than that the"
    " their theirs them themselves then there these they this those through to too under until up very was wasn't we"
    " were weren't what when where which while who whom why will with without won't would wouldn't you your yours"
    " yourself yourselves n't 's 're 've 'll 'd 'm".split()
)
"""English function words, negations among them: another word in their place changes what a text says."""

_WORD = re.compile(r"\S+")
_CORE = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)


class Word(NamedTuple):
    """A word without the punctuation around it: `text[start:end] == core`; empty where there is punctuation alone."""

    start: int
    end: int
    core: str

    @property
    def is_stop_word(self) -> bool:
        """Whether it is an English function word or has no letters or digits."""
        return not self.core or self.core.lower().replace("’", "'") in STOP_WORDS


def words_of(text: str) -> list[Word]:
    """The words of a text, as white space parts them."""
    found = []
    for match in _WORD.finditer(text):
        before, core, _ = _CORE.fullmatch(match[0]).groups()  # type: ignore[union-attr]
        start = match.start() + len(before)
        found.append(Word(start, start + len(core), core))
    return found


def edits(share: float, words: int) -> int:
    """How many of a text's words are edited: the share rounded down, at least one, none at share 0 (Wei & Zou 2019)."""
    return max(1, int(share * words)) if share > 0 else 0


def replaced(text: str, changes: Iterable[tuple[Word, str]]) -> str:
    """The text with other words in the place of some of its own; all else stays, to the character."""
    for word, other in sorted(changes, reverse=True):
        text = text[: word.start] + other + text[word.end :]
    return text


def cased_like(model: str, word: str) -> str:
    """The word in the case of the one it replaces: an initial capital, or capitals throughout."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word
