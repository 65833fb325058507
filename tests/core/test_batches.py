"""Unlabelled rows beside training rows: how many, which, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.batches import Assembler, bucketed, with_unlabelled
from hybridengine.data import Split
from hybridengine.data.rows import row_places
from hybridengine.seams import Batch, Draw


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 30), count=st.integers(1, 30), size=st.integers(1, 5), seed=st.integers(0, 3))
def test_unlabelled_rows_come_in_turn_and_their_versions_at_the_same_places(
    rows: int, count: int, size: int, seed: int
) -> None:
    sampler = with_unlabelled(bucketed([1] * rows, size, seed), count, size, seed, ("unlabelled", "augmented"))
    draws = sampler(1)
    taken = [position for draw in draws for position in draw.parts["unlabelled"][1]]
    assert len(taken) == len(draws) * size
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count)), "each comes once before any comes again"
    for draw in draws:
        split, positions = draw.parts["augmented"]
        assert split == "augmented" and positions == draw.parts["unlabelled"][1]
    assert [draw.parts for draw in sampler(1)] == [draw.parts for draw in draws]


class Task:
    """Collates rows whose feature is their label, if any."""

    def collate(self, run: Any, features: Any, rows: Any, random: Any) -> Batch:
        labels = [feature.get("label") for feature in features]
        targets = None if None in labels else torch.tensor(labels)
        return Batch({"x": torch.zeros(len(rows), 1)}, targets, tuple(rows), counts={"rows": len(rows)})


@pytest.mark.parametrize("labelled", [False, True])
def test_episodes_relabel_their_own_rows_alone(labelled: bool) -> None:
    """Classes of unlabelled rows, should they have any, are no classes of the episode."""
    splits = {name: Split(name, [{}] * 3, f"{name}.csv") for name in ("train", "unlabelled", "augmented")}
    run: Any = SimpleNamespace(task=Task(), splits=splits, seed=0)
    other: list[dict[str, Any]] = [{"label": 9}] * 3 if labelled else [{}] * 3
    assembler = Assembler(run, {"train": [{"label": 4}, {"label": 7}, {"label": 4}], "unlabelled": other})
    parts = {"support": ("train", (2, 1)), "unlabelled": ("unlabelled", (0, 2, 1))}
    batch = assembler.batch("train", Draw((0,), parts, {4: 0, 7: 1}), 0)
    assert batch.targets.tolist() == [0] and batch.parts["support"].targets.tolist() == [0, 1]
    targets = batch.parts["unlabelled"].targets
    assert targets.tolist() == [9] * 3 if labelled else targets is None
    assert batch.counts == {"rows": 1, "unlabelled_rows": 3, "all_rows": 4}


def test_rewritten_rows_have_ids_and_places_of_their_own() -> None:
    splits = {name: Split(name, [{}] * 3, "u.csv", [4, 5, 6]) for name in ("unlabelled", "augmented")}
    ids = [split.ids([1])[0] for split in splits.values()]
    assert len(set(ids)) == 2
    assert row_places(splits, ids) == ["u.csv:5", "u.csv:5"]
