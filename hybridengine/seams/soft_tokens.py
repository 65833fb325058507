"""Soft tokens: learned vectors that stand among a row's token embeddings, addressed by negative token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["SoftTokens", "Vectors"]


class Vectors(nn.Module):
    """A parameter as a module, which returns it: soft tokens `[n, D]`, or prefixes of any shape."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(start)

    def forward(self) -> Tensor:
        """The vectors."""
        return self.vectors


class SoftTokens:
    """The soft tokens of one run: each method's, one behind the other.

    Id -1-i stands for vector i, so that a row with soft tokens is a row of ids like any other: tasks pad it, models
    find its padding and number its positions, and a delta at an embedding site has a place for each.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, range] = {}

    def __len__(self) -> int:
        return sum(map(len, self._numbers.values()))

    def add(self, name: str, count: int) -> list[int]:
        """Take `count` tokens whose vectors `[count, D]` are what run module `name` returns; their ids, in order."""
        self._numbers[name] = range(len(self), len(self) + count)
        return self.ids(name)

    def without(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs `[B, L]` of a model that knows no soft tokens: those columns of each row taken out."""
        ids = inputs["input_ids"]
        real = ids >= 0
        kept = {
            name: value[real].view(len(ids), -1) if value.shape == ids.shape else value
            for name, value in inputs.items()
            if not name.startswith("decoder_")
        }
        if "position_ids" in kept:  # of rows that are padded on the left
            kept["position_ids"] = (kept["attention_mask"].cumsum(1) - 1).clamp_min(0)
        return {**inputs, **kept}

    def clear(self) -> None:
        """Forget all soft tokens, of an adaptation that failed."""
        self._numbers.clear()

    def ids(self, name: str) -> list[int]:
        """The ids of a method's soft tokens."""
        return [-1 - number for number in self._numbers[name]]

    def vectors(self, evaluate: Callable[[str], Tensor]) -> Tensor:
        """All vectors `[N, D]`, vector i for id -1-i; `evaluate` gives those of a module by its name."""
        return torch.cat([evaluate(name) for name in self._numbers])
