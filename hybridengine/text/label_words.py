"""Label words: what a language model's predictions at a mask say about classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hybridengine.errors import ConfigError
from hybridengine.seams.precision import wide
from hybridengine.text.branches import Branches

__all__ = ["AtMask", "LabelWords", "Verbalizer"]

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class AtMask:
    """What a language model says where label words are scored: K positions of each of B rows.

    Attributes:
        logits: `[B, K, V]`; of no use where the cloze spares them.
        states: what its output layer read, `[B, K, D]`; None unless the cloze keeps them.
        value: `value(name, tensor)`, a run module's parameter under the view being evaluated (`ctx.value`).
    """

    logits: Tensor
    states: Tensor | None = None
    value: Callable[[str, Tensor], Tensor] = lambda name, parameter: parameter

    @property
    def log_probabilities(self) -> Tensor:
        """`[B, K, V]`, in at least fp32."""
        return wide(self.logits).log_softmax(-1)


class Verbalizer(Protocol):
    """Who turns what a language model says at the mask into class logits; a cloze asks one."""

    def class_logits(self, seen: AtMask) -> Tensor:
        """`[B, C]`, in at least fp32."""
        ...


class LabelWords:
    """The words of each class as tokens: the verbalizer of a template that names its words.

    Shapes: C classes, N words of the largest, W words in all, M tokens of the longest.

    Args:
        texts: the words of each class, in class order.
        tokens: their tokens.
        masked: whether the model fills masks, or (causal) predicts one token after the other.

    Attributes:
        masks: how many masks a row needs, 0 for a causal model.
        branches: where a causal model scores words of several tokens.

    Raises:
        ConfigError: two classes share a word.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tokens: Sequence[Sequence[Tokens]], masked: bool) -> None:
        self.texts = [list(group) for group in texts]
        self.tokens = [list(group) for group in tokens]
        self._check_distinct()
        flat = [word for group in tokens for word in group]
        self.masks = max(map(len, flat)) if masked else 0
        self.branches = None if masked else Branches(flat)
        slots = torch.arange(self.masks).expand(len(flat), -1) if self.branches is None else self.branches.slots
        self._constants: tuple[Tensor, ...] = (slots, *_tables(flat, masked), *_groups(tokens))

    def _check_distinct(self) -> None:
        owner: dict[Tokens, tuple[int, str]] = {}
        for index, group in enumerate(self.tokens):
            for word, ids in zip(self.texts[index], group, strict=True):
                other, same = owner.setdefault(ids, (index, word))
                if other != index:
                    raise ConfigError(
                        f"template: two labels share a word: {same!r} and {word!r} are the same tokens; choose others"
                    )

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The tables of the scores; they stay on the device of their last use: a copy in each forward makes it wait."""
        if self._constants[0].device != device:
            self._constants = tuple(table.to(device) for table in self._constants)
        return self._constants

    def scores(self, log_probabilities: Tensor) -> Tensor:
        """Scores of all words `[B, W]` from log-probabilities `[B, K, V]`.

        A word scores the mean (masked) or the sum (causal: the chain rule) of its tokens' log-probabilities.
        """
        slots, table, share, _, _ = self._on(log_probabilities.device)
        tokens = log_probabilities[:, slots, table]  # [B, W, M]
        return (tokens * share.to(tokens.dtype)).sum(-1)

    def by_class(self, values: Tensor, empty: float = -math.inf) -> Tensor:
        """Values of all words `[..., W]` by class, `[..., C, N]`, and `empty` where a class has fewer words."""
        groups = self._on(values.device)[3]
        return values[..., groups.clamp_min(0)].masked_fill(groups.eq(-1), empty)

    def class_logits(self, seen: AtMask) -> Tensor:
        """The log of the mean probability of each class's words, `[B, C]`."""
        scores = self.scores(seen.log_probabilities)
        sizes = self._on(scores.device)[4]
        return self.by_class(scores).logsumexp(-1) - sizes.to(scores.dtype).log()


def _tables(words: Sequence[Tokens], masked: bool) -> tuple[Tensor, Tensor]:
    """Token ids `[W, M]`, 0-padded, and what each token counts in its word's score `[W, M]`."""
    longest = max(map(len, words))
    table = torch.tensor([[*word, *[0] * (longest - len(word))] for word in words])
    share = [[1 / len(word) if masked else 1.0] * len(word) + [0.0] * (longest - len(word)) for word in words]
    return table, torch.tensor(share, dtype=torch.float64)


def _groups(tokens: Sequence[Sequence[Tokens]]) -> tuple[Tensor, Tensor]:
    """Word numbers of each class `[C, N]`, padded by -1, and words per class `[C]`."""
    numbers = iter(range(sum(map(len, tokens))))
    groups = [[next(numbers) for _ in group] for group in tokens]
    widest = max(map(len, groups))
    padded = torch.tensor([group + [-1] * (widest - len(group)) for group in groups])
    return padded, torch.tensor([len(group) for group in groups])
