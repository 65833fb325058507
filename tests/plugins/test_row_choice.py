"""`few-shot`, `balanced-sampling` and `curriculum`: which rows are drawn, how often, when, and by what key."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.errors import DataError, StackError
from hybridengine.plugin import Run, Split
from hybridengine.seams.precision import LossScale, Precision
from hybridengine.testing import tiny_config
from hybridengine_plugins.data.balanced_sampling import BalancedSampling
from hybridengine_plugins.data.curriculum import Curriculum
from hybridengine_plugins.data.few_shot import FewShot


class Roles:
    """The roles of a task, which is all that these methods ask of it."""

    def __init__(self, **columns: str) -> None:
        self.columns = columns


def run_of(rows: list[dict[str, Any]], seed: int = 0, **train: Any) -> Run:
    run = Run(tiny_config(seed=seed, **train), torch.device("cpu"), Precision("fp32", None), LossScale(1.0))
    run.task = Roles(text="text", label="label")
    run.splits = {name: Split(name, rows, "a.csv") for name in ("train", "validation", "test")}
    run.total_steps = 40
    return run


def labelled(**counts: int) -> list[dict[str, Any]]:
    rows = [{"text": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (i * 7919) % 101)]  # mixed up


# ---- few-shot --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.booleans())
def test_few_shot_keeps_k_rows_of_each_class(shots: int, seed: int, validation: bool) -> None:
    run = run_of(labelled(a=9, b=5, c=20), seed)
    out = FewShot(shots, validation).transform_data(run, run.splits)
    for name, split in out.items():
        reduced = name == "train" or (validation and name == "validation")
        wanted = dict.fromkeys("abc", shots) if reduced else {"a": 9, "b": 5, "c": 20}
        assert Counter(row["label"] for row in split.rows) == wanted
        places = [run.splits[name].where(i) for i, row in enumerate(run.splits[name].rows) if row in split.rows]
        assert [split.where(i) for i in range(len(split))] == places  # in the old order, origins kept
    more = FewShot(shots, validation).transform_data(run_of(labelled(a=9, b=5, c=20), seed), run.splits)
    assert more["train"].rows == out["train"].rows


def test_few_shot_choices_nest_and_differ_by_seed_and_split() -> None:
    texts = {}
    for seed, shots in [(0, 2), (0, 4), (1, 4)]:
        run = run_of(labelled(a=30, b=30), seed)
        out = FewShot(shots, validation=True).transform_data(run, run.splits)
        texts[seed, shots] = {row["text"] for row in out["train"].rows}
        assert texts[seed, shots] != {row["text"] for row in out["validation"].rows}
    assert texts[0, 2] < texts[0, 4] != texts[1, 4]


def test_few_shot_leaves_unlabelled_rows_out_and_tells_what_it_kept() -> None:
    run = run_of([*labelled(a=3, b=3), {"text": "?"}])
    assert len(FewShot(2).transform_data(run, run.splits)["train"]) == 4
    assert "few-shot: 4 of 7 train rows, 2 of each class" in run.notes


def test_few_shot_refusals() -> None:
    run = run_of(labelled(a=3, b=1))
    with pytest.raises(DataError, match="class 'b' has 1 rows in the train split, not 2; lower `shots`"):
        FewShot(2).transform_data(run, run.splits)
    many = run_of([{"text": "x", "label": ["a"]}])
    with pytest.raises(DataError, match=r"a.csv:1 has several labels"):
        FewShot(1).transform_data(many, many.splits)
    run.task = Roles(text="text")
    with pytest.raises(StackError, match="remove few-shot"):
        FewShot(1).transform_data(run, run.splits)


# ---- balanced-sampling -----------------------------------------------------------------------------------------------


def drawn(method: Any, run: Run, epoch: int) -> list[int]:
    return [row for draw in method.build_sampler(run, "train")(epoch) for row in draw.rows]


@pytest.mark.parametrize(
    ("power", "wanted"), [(1.0, {"a": 90, "b": 10}), (0.0, {"a": 50, "b": 50}), (0.5, {"a": 75, "b": 25})]
)
def test_balanced_sampling_draws_by_the_formula(power: float, wanted: dict[str, int]) -> None:
    run = run_of(labelled(a=90, b=10), batch_size=16)
    labels = [row["label"] for row in run.splits["train"].rows]
    for epoch in (0, 1):
        rows = drawn(BalancedSampling(power), run, epoch)
        assert Counter(labels[i] for i in rows) == wanted
    draws = BalancedSampling(power).build_sampler(run, "train")(3)
    assert [len(draw.rows) for draw in draws] == [16] * 6 + [4] and {draw.epoch for draw in draws} == {3}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 3), st.integers(1, 4))
def test_balanced_sampling_lets_rows_of_a_class_take_turns(
    a: int, b: int, power: float, seed: int, epochs: int
) -> None:
    run = run_of(labelled(a=a, b=b), seed)
    labels = [row["label"] for row in run.splits["train"].rows]
    method, seen = BalancedSampling(power), Counter()
    for epoch in range(epochs):
        rows = drawn(method, run, epoch)
        assert len(rows) == a + b and rows == drawn(method, run, epoch)
        seen.update(rows)
    for label in "ab":
        times = [seen[i] for i, own in enumerate(labels) if own == label]
        assert max(times) - min(times) <= 1


def test_balanced_sampling_refusals_and_other_splits() -> None:
    run = run_of([{"text": "x", "label": "a"}, {"text": "y"}])
    assert BalancedSampling().build_sampler(run, "validation") is None
    with pytest.raises(DataError, match=r"a.csv:2 has no label, it needs one; remove"):
        BalancedSampling().build_sampler(run, "train")
    with pytest.raises(DataError, match=r"a.csv:1 has several labels"):
        BalancedSampling().build_sampler(run_of([{"text": "x", "label": ["a"]}]), "train")
    run.task = Roles(text="text", summary="summary")
    with pytest.raises(StackError, match="this task reads text, summary"):
        BalancedSampling().build_sampler(run, "train")


# ---- curriculum ------------------------------------------------------------------------------------------------------


def growing(count: int = 40) -> list[dict[str, Any]]:
    """Row i has (i * 7) % count + 1 words: each length once."""
    return [{"text": " ".join(["w"] * ((i * 7) % count + 1)), "label": "a"} for i in range(count)]


def test_curriculum_draws_from_the_easiest_part_and_then_from_all() -> None:
    rows = growing(40 - 1)  # 7 and 39 share no divisor
    run = run_of(rows, batch_size=4)
    method = Curriculum(start=0.2, share=0.5)
    words = [len(row["text"].split()) for row in rows]
    draws = [draw for epoch in range(4) for draw in method.build_sampler(run, "train")(epoch)]
    assert len(draws) == 40
    for step, draw in enumerate(draws):
        assert len(set(draw.rows)) == len(draw.rows)
        competence = min(1.0, (step * (1 - 0.04) / 20 + 0.04) ** 0.5)  # Platanios et al., equation 7
        assert max(words[i] for i in draw.rows) <= max(4, -(-39 * competence // 1))
    late = [i for draw in draws[20:30] for i in draw.rows]
    assert sorted(late) == list(range(39))  # an epoch of all rows, each once
    assert draws == [draw for epoch in range(4) for draw in method.build_sampler(run, "train")(epoch)]


def test_curriculum_knows_the_step_where_micro_batches_are_summed() -> None:
    run = run_of(growing(39), batch_size=4, accumulate=2)
    run.total_steps = 20
    words = [len(row["text"].split()) for row in run.splits["train"].rows]
    draws = Curriculum(start=0.2, share=1.0).build_sampler(run, "train")(2)
    step = 20 // 2  # the third epoch begins after 20 batches
    assert max(words[i] for i in draws[0].rows) <= -(-39 * (step * 0.96 / 20 + 0.04) ** 0.5 // 1)


def test_curriculum_by_rarity_puts_rare_words_last() -> None:
    rows = [{"text": text, "label": "a"} for text in ["rare odd", "the the the", "the film", "the the"]]
    run = run_of(rows, batch_size=1)
    first = Curriculum(by="rarity", start=0.25).build_sampler(run, "train")(0)[0]
    # -log p: "the" 6/9... the film 0.4 + 2.2, the the 0.8, the the the 1.2, rare odd 4.4
    assert rows[first.rows[0]]["text"] == "the the"
    assert rows[Curriculum(by="length", start=0.25).build_sampler(run, "train")(0)[0].rows[0]]["text"] == "rare odd"


def test_curriculum_leaves_other_splits_alone() -> None:
    assert Curriculum().build_sampler(run_of(growing()), "validation") is None
