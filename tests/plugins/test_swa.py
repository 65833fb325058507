"""SWA is the plain mean of the weights it saw; training is unchanged; evaluation swaps."""

from __future__ import annotations

import pytest
import torch
from plain import LR, apart, bert
from torch import Tensor

from hybridengine.plugin import Method
from hybridengine.stack import check_stack
from hybridengine.testing import Bench, make_batch, set_up
from hybridengine_plugins.adapters.gradual_unfreeze import GradualUnfreeze
from hybridengine_plugins.regularize.ema import EMA
from hybridengine_plugins.regularize.swa import SWA


def _trained(start: int, every: int, steps: int) -> tuple[Bench, list[dict[str, Tensor]]]:
    batch = make_batch()
    bench = set_up([SWA(start=start, every=every)], bert(), batch, lr=LR)
    path = []
    for _ in range(steps):
        bench.step([batch])
        path.append(bench.parameters())
    return bench, path


@pytest.mark.parametrize(("start", "every"), [(0, 1), (2, 1), (1, 2), (2, 3)])
def test_is_the_mean_of_the_chosen_weights(start: int, every: int) -> None:
    bench, path = _trained(start, every, 6)
    chosen = path[start::every]
    average = bench.run.state("swa")
    for name in path[0]:
        # lerp_ rounds once a step; six steps of fp64 stay below 1e-14 of the largest weight.
        torch.testing.assert_close(average[name], torch.stack([p[name] for p in chosen]).mean(0), rtol=0, atol=1e-13)


def test_training_is_unchanged() -> None:
    batch = make_batch()
    plain = set_up([], bert(), batch, lr=LR)
    for _ in range(3):
        plain.step([batch])
    bench, _ = _trained(0, 1, 3)
    assert all(torch.equal(x, plain.parameters()[k]) for k, x in bench.parameters().items())
    assert bench.ctx.trace.text() == "F4 B S"


def test_evaluation_swaps_and_restores_to_the_bit() -> None:
    bench, path = _trained(0, 1, 3)
    with bench.evaluation():
        inside = bench.parameters()
    assert all(torch.equal(inside[k], value) for k, value in bench.run.state("swa").items())
    assert all(torch.equal(x, path[-1][k]) for k, x in bench.parameters().items())
    assert apart(inside, path[-1]) > 1e-6


def test_before_the_start_evaluation_sees_the_weights() -> None:
    bench, path = _trained(5, 1, 3)
    with bench.evaluation():
        assert all(torch.equal(x, path[-1][k]) for k, x in bench.parameters().items())


def test_reports_its_distance() -> None:
    bench, _ = _trained(3, 4, 5)
    assert bench.effect("swa", "distance") > 0


def test_only_one_average_can_be_evaluated() -> None:
    (problem,) = check_stack([Method("swa", SWA(start=0)), Method("ema", EMA())], set())
    assert "swa" in problem
    assert "ema" in problem


def test_weights_that_wait_their_turn_count_from_the_start() -> None:
    batch, path = make_batch(), []
    bench = set_up([SWA(start=0), GradualUnfreeze(steps=1)], bert(), batch, lr=LR)
    for _ in range(6):
        bench.step([batch])
        path.append(bench.parameters())
    for name, average in bench.run.state("swa").items():
        wanted = torch.stack([weights[name] for weights in path]).mean(0)
        torch.testing.assert_close(average, wanted, rtol=0, atol=1e-13)
