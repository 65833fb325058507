"""Batch, Work, View, Out: the values that travel through the seams."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridengine.seams import Batch, Out, View, Work, add_terms, weighted_sum
from hybridengine.seams.base import make_works
from hybridengine.testing import make_batch


def test_values_are_frozen_and_compare_by_identity() -> None:
    for value in (View(), make_batch(), Work(make_batch(), {}), Out()):
        name = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    assert View(key=1) != View(key=1)  # comparing tensors by value would be ambiguous and slow


def test_scaled_multiplies_every_unit_and_keeps_the_rest() -> None:
    work = Work(make_batch(), {"rows": 0.5, "tokens": 0.25}, View(key=3), 7)
    half = work.scaled(0.5)
    assert half.weights == {"rows": 0.25, "tokens": 0.125}
    assert (half.batch, half.view, half.id) == (work.batch, work.view, 7)
    assert work.weights == {"rows": 0.5, "tokens": 0.25}


def test_scaling_by_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="zero the gradient of delta"):
        Work(make_batch(), {"rows": 1.0}).scaled(0)


def test_at_changes_the_view_alone() -> None:
    work, view = Work(make_batch(), {"rows": 1.0}, View(key=1), 2), View(key=9)
    there = work.at(view)
    assert there.view is view
    assert (there.batch, there.weights, there.id) == (work.batch, work.weights, 2)


def test_plus_adds_where_a_delta_stands_already() -> None:
    one, two = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    view = View(key=5).plus({"a": one}).plus({"a": two, "b": two})
    assert torch.equal(view.delta["a"], torch.full((2, 3, 4), 3.0))
    assert torch.equal(view.delta["b"], two)
    assert view.key == 5


def test_clean_drops_the_delta_and_nothing_else() -> None:
    params = {"w": torch.ones(1)}
    view = View(params=params, key=5).plus({"a": torch.ones(1, 1, 1)}).clean()
    assert dict(view.delta) == {}
    assert (view.params, view.key) == (params, 5)


def test_fork_is_named_reproducible_and_nests() -> None:
    view = View(key=5)
    assert view.fork("a", 0).key == View(key=5).fork("a", 0).key
    keys = {view.key, view.fork("a", 0).key, view.fork("a", 1).key, view.fork("b").key, view.fork("b").fork("b").key}
    assert len(keys) == 5
    assert View().fork("a").key is None


def test_with_params_replaces_the_named_ones() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    view = View(params={"a": a, "b": a}).with_params({"b": b, "c": c})
    assert view.params is not None
    assert dict(view.params) == {"a": a, "b": b, "c": c}


def test_repeat_stacks_rows_and_keeps_the_counts_of_one_copy() -> None:
    batch = make_batch(kind="tokens")
    twice = batch.repeat(2)
    assert twice.size == 2 * batch.size
    assert twice.rows == batch.rows * 2
    assert twice.counts == batch.counts
    for name, value in batch.inputs.items():
        assert torch.equal(twice.inputs[name], torch.cat([value, value]))
    assert torch.equal(twice.targets, torch.cat([batch.targets, batch.targets]))
    assert twice.masks["scored"]["input_ids"].shape[0] == 2 * batch.size


def test_to_moves_parts_too() -> None:
    batch = make_batch(parts={"unlabelled": make_batch(seed=1)}).to(torch.device("meta"))
    assert batch.inputs["input_ids"].is_meta
    assert batch.targets.is_meta
    assert batch.masks["attention"]["input_ids"].is_meta
    assert batch.parts["unlabelled"].inputs["input_ids"].is_meta


def test_a_loss_is_sums_with_units() -> None:
    terms = {"ce": (torch.tensor(6.0), "tokens"), "kl": (torch.tensor(2.0), "rows")}
    assert weighted_sum(terms, {"tokens": 0.5, "rows": 0.25}) == pytest.approx(3.5)
    with pytest.raises(KeyError, match=r"'kl' is counted in 'rows', but the batch counts only \['tokens'\]"):
        weighted_sum(terms, {"tokens": 0.5})
    with pytest.raises(ValueError, match="no terms"):
        weighted_sum({}, {"rows": 1.0})


def test_add_terms_sums_by_name() -> None:
    one = torch.tensor(1.0)
    assert add_terms({"a": one}, {"a": one, "b": one}, {}) == {"a": 2.0, "b": 1.0}


def test_scores_are_at_least_fp32_and_need_logits() -> None:
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert Out(logits=torch.ones(1, dtype=dtype)).scores.dtype == wanted
    with pytest.raises(ValueError, match="no logits"):
        _ = Out().scores


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from("ab")), min_size=1, max_size=6))
def test_weights_are_one_over_the_total_of_the_step_per_task_and_unit(sizes: list[tuple[int, int, str]]) -> None:
    batches = [
        Batch({"input_ids": torch.zeros(1, 1)}, counts={"rows": rows, "tokens": tokens}, task=task)
        for rows, tokens, task in sizes
    ]
    works = make_works(0, 0, batches)
    assert len({work.view.key for work in works}) == len(works)
    assert [work.id for work in works] == list(range(len(works)))
    for work in works:
        for unit in ("rows", "tokens"):
            total = sum(b.counts[unit] for b in batches if b.task == work.batch.task)
            assert work.weights[unit] == 1 / max(total, 1)
    assert [w.view.key for w in make_works(0, 1, batches)] != [w.view.key for w in works]
