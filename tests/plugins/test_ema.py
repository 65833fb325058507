"""EMA against its recursion; evaluation by swap; exact restoration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import EXACT, LR, apart, bert, gradients
from torch import Tensor

from hybridengine.seams import View
from hybridengine.testing import Bench, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.regularize.ema import EMA


def trained(decay: float, steps: int) -> tuple[Bench, list[dict[str, Tensor]]]:
    batch = make_batch()
    bench = set_up([EMA(decay=decay)], bert(), batch, lr=LR)
    path = [bench.parameters()]
    for _ in range(steps):
        bench.step([batch])
        path.append(bench.parameters())
    return bench, path


@settings(max_examples=6, deadline=None)
@given(decay=st.floats(0, 0.999), steps=st.integers(1, 6))
def test_matches_the_recursion(decay: float, steps: int) -> None:
    bench, path = trained(decay, steps)
    for name, shadow in bench.run.state("ema").items():
        wanted = path[0][name]
        for step, weights in enumerate(path[1:]):
            rate = min(decay, (1 + step) / (10 + step))
            wanted = rate * wanted + (1 - rate) * weights[name]
        torch.testing.assert_close(shadow, wanted)


def test_training_is_unchanged() -> None:
    batch = make_batch()
    plain = set_up([], bert(), batch, lr=LR)
    averaged = set_up([EMA()], bert(), batch, lr=LR)
    for _ in range(3):
        plain.step([batch])
        averaged.step([batch])
    assert all(torch.equal(x, plain.parameters()[k]) for k, x in averaged.parameters().items())
    assert averaged.ctx.trace.text() == "F4 B S"


def test_decay_zero_is_the_weights_themselves() -> None:
    bench, path = trained(0.0, 2)
    assert all(torch.equal(x, path[-1][k]) for k, x in bench.run.state("ema").items())


def test_evaluation_swaps_and_restores_to_the_bit() -> None:
    bench, path = trained(0.9, 3)
    shadow = bench.run.state("ema")
    with bench.evaluation():
        inside = bench.parameters()
        scores = bench.ctx.predict(bench.ctx, make_batch(), View()).scores
        assert not bench.run.model.training
    assert all(torch.equal(inside[k], shadow[k]) for k in shadow)
    assert all(torch.equal(x, path[-1][k]) for k, x in bench.parameters().items())
    assert bench.run.model.training
    assert scores is not None
    assert not torch.equal(scores, bench.ctx.predict(bench.ctx, make_batch(), View()).scores)

    def fail() -> None:
        with bench.evaluation():
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(x, path[-1][k]) for k, x in bench.parameters().items())
    assert bench.run.model.training


def test_evaluation_before_the_first_step_is_that_of_the_weights() -> None:
    bench = set_up([EMA()], bert(), make_batch())
    before = bench.parameters()
    with bench.evaluation():
        assert all(torch.equal(x, before[k]) for k, x in bench.parameters().items())


def test_the_average_sees_restored_weights_not_perturbed_ones() -> None:
    batch = make_batch()
    bench = set_up([SAM(rho=5.0), EMA(decay=0.0)], bert(), batch, lr=LR)
    bench.step([batch])
    assert all(torch.equal(x, bench.parameters()[k]) for k, x in bench.run.state("ema").items())


def test_half_precision_weights_are_averaged_in_fp32() -> None:
    """In bf16 a step of 1 - 0.999 would round to nothing."""
    batch = make_batch()
    bench = set_up([EMA()], tiny_bert(num_labels=3).bfloat16(), batch, lr=LR)
    bench.run.step = 10**6  # past the warm-up
    for _ in range(2):
        bench.step([batch])
    shadow = bench.run.state("ema")
    assert all(x.dtype == torch.float32 for x in shadow.values())
    assert bench.effect("ema", "distance") > 0
    with bench.evaluation():
        assert all(torch.equal(x, shadow[k].bfloat16()) for k, x in bench.parameters().items())


def test_weights_thawed_later_join_later() -> None:
    batch, model = make_batch(), bert()
    bench = set_up([EMA()], model, batch, lr=LR)
    model.bert.requires_grad_(False)
    bench.step([batch])
    assert all(name.startswith("classifier") for name in bench.run.state("ema"))
    model.bert.requires_grad_(True)
    bench.step([batch])
    assert bench.run.state("ema").keys() == bench.run.optimised().keys()
    model.bert.requires_grad_(False)
    with bench.evaluation():
        pass


def test_gradients_are_those_of_the_inner_step() -> None:
    batch = make_batch()
    assert apart(gradients(lambda: [EMA()], [batch], bert()), gradients(list, [batch], bert())) < EXACT
