"""Curriculum: easy rows first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hybridengine.plugin import Run, Traits, hook, parameter
from hybridengine.seams import Draw, permutation

__all__ = ["Curriculum"]


@dataclass(eq=False)
class Curriculum:
    """Draws training rows from the easiest part of the data, which grows until it is all of it.

    Maths: at step t of the first T = `share` of all steps, batches are drawn from the c·N easiest of N rows, with
    c = √(t (1 − start²)/T + start²); afterwards from all. Difficulty is the number of words, or their rarity,
    −Σ log p(word), p the share in the training texts, so that long texts are harder either way. An epoch has its usual
    number of batches; while the part grows its rows are random, so that some come twice and others not at all.

    Paper: Platanios et al. 2019, "Competence-based Curriculum Learning for Neural Machine Translation".
    Hooks: `build_sampler`. Cost: none. Combines with everything but other orders of the rows.
    """

    traits: ClassVar[Traits] = Traits(
        family="data",
        slots=("sampler",),
        paper="Platanios et al. 2019, arXiv:1903.09848",
        combines="everything but balanced-sampling and episodes",
    )

    by: Literal["length", "rarity"] = parameter("length", "what makes a row difficult")
    start: float = parameter(0.1, "share of the rows that the first step draws from", gt=0, le=1)
    share: float = parameter(0.5, "share of all steps after which every row is drawn from", gt=0, le=1)

    @hook
    def build_sampler(self, run: Run, split: str) -> Callable[[int], list[Draw]] | None:
        """Draws of the training split."""
        if split != "train":
            return None
        words = [_words(row) for row in run.splits[split].rows]
        known = Counter(word for text in words for word in text)
        total = sum(known.values())
        hard = [
            len(text) if self.by == "length" else sum(math.log(total / known[word]) for word in text) for text in words
        ]
        easiest_first = sorted(range(len(words)), key=lambda i: (hard[i], i))
        train = run.config.train
        batches = -(-len(words) // train.batch_size)

        def draws(epoch: int) -> list[Draw]:
            whole = iter(permutation(len(words), run.seed, "curriculum", epoch))
            found = []
            for index in range(batches):
                step = (epoch * batches + index) // train.accumulate
                # At least a batch: a row never comes twice in one.
                pool = max(
                    min(train.batch_size, len(words)), math.ceil(self._competence(step, run.total_steps) * len(words))
                )
                if pool >= len(words):
                    rows = [next(whole, None) for _ in range(train.batch_size)]
                    kept = tuple(i for i in rows if i is not None)
                else:
                    order = permutation(pool, run.seed, "curriculum", epoch, index)
                    kept = tuple(easiest_first[i] for i in order[: train.batch_size])
                found.append(Draw(kept, epoch=epoch))
            return found

        return draws

    def _competence(self, step: int, total: int) -> float:
        """Share of the rows, easiest first, that a step may draw from."""
        grown = min(1.0, step / max(1.0, self.share * total))
        return min(1.0, math.sqrt(grown * (1 - self.start**2) + self.start**2))


def _words(row: Any) -> list[str]:
    """The words that the model reads of a row: all texts that are no answer."""
    if row.get("tokens") is not None:
        return [str(word) for word in row["tokens"]]
    return " ".join(str(row[role]) for role in ("text", "text_pair") if row.get(role)).lower().split()
