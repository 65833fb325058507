"""Early stopping counts evaluations, knows directions, and resumes."""

from __future__ import annotations

import math

import pytest

from hybridengine.errors import ConfigError
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.optim.early_stopping import EarlyStopping


def _run():
    return set_up([], tiny_bert(num_labels=3), make_batch()).run


def _stopped_at(method, values, metric="accuracy", run=None):
    run = run or _run()
    for index, value in enumerate(values):
        run.step = index
        method.on_evaluate(run, {"main": "accuracy", "accuracy": 0.0, "per_class": {}, metric: value})
        if run.stop_reason:
            return index
    return None


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.3], 2, 3),
        ([0.1, 0.2, 0.1, 0.3, 0.2, 0.2, 0.2], 3, 6),
        ([0.1, 0.2, 0.3], 1, None),
        ([math.nan, 0.1, math.nan, math.nan], 2, 3),
        ([math.nan, math.nan], 2, 1),
        ([0.5, None, None], 2, 2),
        ([None, math.inf, 0.5], 2, 1),
    ],
)
def test_stops_after_patience_evaluations_without_a_better_one(values, patience, expected):
    assert _stopped_at(EarlyStopping(patience=patience), values) == expected


def test_losses_get_better_downwards_and_small_changes_do_not_count():
    assert _stopped_at(EarlyStopping(patience=2, metric="loss"), [3.0, 2.0, 1.0, 1.0, 2.0], "loss") == 4
    assert _stopped_at(EarlyStopping(patience=2, metric="loss", mode="max"), [3.0, 2.0, 1.0], "loss") == 2
    assert _stopped_at(EarlyStopping(patience=2, min_delta=0.05), [0.5, 0.52, 0.54, 0.6]) == 2


def test_counts_are_part_of_the_run_state():
    values = [0.5, 0.4, 0.4, 0.4, 0.4]
    whole, first, second = _run(), _run(), _run()
    _stopped_at(EarlyStopping(patience=4), values, run=whole)
    _stopped_at(EarlyStopping(patience=4), values[:3], run=first)
    second.state("early-stopping").update(first.state("early-stopping"))
    assert _stopped_at(EarlyStopping(patience=4), values[3:], run=second) == 1
    assert whole.state("early-stopping") == second.state("early-stopping")


def test_an_unknown_metric_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"acuracy.*'accuracy'"):
        EarlyStopping(metric="acuracy").on_evaluate(_run(), {"accuracy": 1.0})
