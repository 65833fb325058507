"""From rows to micro-batches: which rows go together (draws), and their assembly into a `Batch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hybridengine.data.rows import Split
from hybridengine.run import Run
from hybridengine.seams.randomness import KeyedRows, permutation
from hybridengine.seams.task import Feature
from hybridengine.seams.types import Batch, Draw

__all__ = ["Assembler", "Sampler", "bucketed", "in_order", "with_unlabelled"]

Sampler = Callable[[int], list[Draw]]
"""From epoch to that epoch's micro-batches, in order."""

_WINDOW = 100  # batches sorted by length together: little padding, and no fixed company for a row


def bucketed(lengths: Sequence[int], batch_size: int, seed: int) -> Sampler:
    """Shuffled batches of rows of similar length; every row once per epoch, a function of (seed, epoch) alone."""

    def draws(epoch: int) -> list[Draw]:
        order = permutation(len(lengths), seed, "order", epoch)
        chunks: list[tuple[int, ...]] = []
        for start in range(0, len(order), batch_size * _WINDOW):
            window = sorted(order[start : start + batch_size * _WINDOW], key=lambda i: lengths[i])
            chunks += [tuple(window[i : i + batch_size]) for i in range(0, len(window), batch_size)]
        return [Draw(chunks[i], epoch=epoch) for i in permutation(len(chunks), seed, "chunks", epoch)]

    return draws


def in_order(lengths: Sequence[int], batch_size: int) -> Sampler:
    """Batches for evaluation: sorted by length, longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    fixed = [Draw(tuple(order[i : i + batch_size])) for i in range(0, len(order), batch_size)]
    return lambda epoch: fixed


def with_unlabelled(
    sampler: Sampler, count: int, batch_size: int, seed: int, splits: Sequence[str] = ("unlabelled",)
) -> Sampler:
    """Attach `batch_size` unlabelled rows to every draw, walking through them in a shuffled order.

    Args:
        splits: from each of these, rows at the same positions, as a part of its name.
    """

    def draws(epoch: int) -> list[Draw]:
        base = sampler(epoch)
        order: list[int] = []
        turn = 0
        while len(order) < len(base) * batch_size:
            order += permutation(count, seed, "unlabelled", epoch, turn)
            turn += 1
        parts = [tuple(order[i * batch_size : (i + 1) * batch_size]) for i in range(len(base))]
        return [
            replace(d, parts={**d.parts, **{name: (name, p) for name in splits}})
            for d, p in zip(base, parts, strict=True)
        ]

    return draws


class Assembler:
    """Turns draws into batches from the features of each split. Pure: the same draw and step give the same batch."""

    def __init__(self, run: Run, features: Mapping[str, Sequence[Feature]]) -> None:
        self._run = run
        self._features = features
        self._splits: Mapping[str, Split] = run.splits

    def batch(self, split: str, draw: Draw, step: int) -> Batch:
        """The batch of a draw, with its parts, on the CPU; `step` keys collation randomness (masked tokens)."""
        own = self._collate(split, draw.rows, step, draw.relabel)
        parts = {
            name: self._collate(part_split, positions, step, draw.relabel if part_split == split else None)
            for name, (part_split, positions) in draw.parts.items()
        }
        if not parts:
            return own
        counts = dict(own.counts)
        if "unlabelled" in parts:
            counts["unlabelled_rows"] = parts["unlabelled"].size
            counts["all_rows"] = counts.get("all_rows", own.size) + parts["unlabelled"].size
        return replace(own, parts=parts, counts=counts)

    def _collate(self, split: str, positions: Sequence[int], step: int, relabel: Mapping[int, int] | None) -> Batch:
        features = [self._features[split][i] for i in positions]
        rows = self._splits[split].ids(positions)

        def random(stream: str, ids: Sequence[int]) -> KeyedRows:
            return KeyedRows((self._run.seed, stream, step), ids)

        batch: Batch = self._run.task.collate(self._run, features, rows, random)
        return batch if relabel is None else replace(batch, targets=_relabelled(batch.targets, relabel))


def _relabelled(targets: Any, relabel: Mapping[int, int]) -> torch.Tensor:
    return torch.tensor([relabel[int(t)] for t in targets], dtype=torch.long)
