"""How alike texts are by the words they share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

__all__ = ["WordSimilarity"]

_CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # of Chinese and Japanese, which set no spaces
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+")


class WordSimilarity:
    """Cosines of TF-IDF vectors: tf is a word's count, idf = 1 + ln((1 + n) / (1 + n_w)) over the n given texts.

    Words are runs of letters and digits in lower case, and single characters of Chinese and Japanese; a word that none
    of the texts has counts nothing.

    Args:
        texts: the texts to compare others with.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_words(text)) for text in texts]
        holding = Counter(word for count in counts for word in count)
        self._idf = {word: 1 + math.log((1 + len(texts)) / (1 + n)) for word, n in holding.items()}
        self._vectors = [self._unit(count) for count in counts]

    def to(self, text: str) -> list[float]:
        """The cosine of `text` with each of the texts; 0 where they share no word."""
        vector = self._unit(Counter(_words(text)))
        return [sum(value * other.get(word, 0.0) for word, value in vector.items()) for other in self._vectors]

    def _unit(self, count: Mapping[str, int]) -> dict[str, float]:
        vector = {word: n * self._idf[word] for word, n in count.items() if word in self._idf}
        length = math.hypot(*vector.values()) or 1.0
        return {word: value / length for word, value in vector.items()}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
