"""Lookahead against its recursion; evaluation by the slow weights; resume."""

from __future__ import annotations

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, key
from torch import Tensor

from hybridengine.testing import Bench, make_batch, set_up
from hybridengine_plugins.optim.lookahead import Lookahead
from hybridengine_plugins.regularize.ema import EMA


def _walk(steps: int, alpha: float, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Zhang et al. 2019, algorithm 1, with SGD inside: fast and slow weights after `count` updates."""
    plain, batch = Plain(bert()), make_batch()
    slow = {k: p.detach().clone() for k, p in plain.parameters.items()}
    for t in range(count):
        plain.descend(plain.gradient(plain.loss(batch, key(t))))
        if (t + 1) % steps == 0:
            slow = {k: s + alpha * (plain.parameters[k].detach() - s) for k, s in slow.items()}
            with torch.no_grad():
                for k, p in plain.parameters.items():
                    p.copy_(slow[k])
    return {k: p.detach() for k, p in plain.parameters.items()}, slow


def _trained(method: Lookahead, count: int, *more: object) -> Bench:
    batch = make_batch()
    bench = set_up([method, *more], bert(), batch, lr=LR)
    for _ in range(count):
        bench.step([batch])
    return bench


@pytest.mark.parametrize(("steps", "alpha", "count"), [(2, 0.5, 5), (3, 0.8, 6), (1, 0.3, 3)])
def test_matches_the_paper(steps: int, alpha: float, count: int) -> None:
    bench = _trained(Lookahead(steps=steps, alpha=alpha), count)
    fast, slow = _walk(steps, alpha, count)
    assert apart(bench.parameters(), fast) < EXACT
    assert apart(bench.run.state("lookahead"), slow) < EXACT
    assert bench.effect("lookahead", "distance") > 0


def test_alpha_one_is_the_optimizer_alone() -> None:
    plain = set_up([], bert(), make_batch(), lr=LR)
    for _ in range(4):
        plain.step([make_batch()])
    assert apart(_trained(Lookahead(steps=2, alpha=1.0), 4).parameters(), plain.parameters()) < EXACT


def test_evaluation_sees_the_slow_weights_and_restores_to_the_bit() -> None:
    bench = _trained(Lookahead(steps=2), 3)
    fast = bench.parameters()
    with bench.evaluation():
        inside = bench.parameters()
    assert all(torch.equal(inside[k], s) for k, s in bench.run.state("lookahead").items())
    assert all(torch.equal(x, fast[k]) for k, x in bench.parameters().items())
    assert apart(inside, fast) > 1e-6


@pytest.mark.parametrize("first", [True, False])
def test_an_average_around_it_follows_the_moved_weights_and_is_evaluated(first: bool) -> None:
    batch = make_batch()
    methods = [Lookahead(steps=1, alpha=0.5), EMA(decay=0.5)]
    bench = set_up(methods if first else methods[::-1], bert(), batch, lr=LR)
    start = bench.parameters()
    bench.step([batch])
    moved = bench.parameters()
    with bench.evaluation():
        inside = bench.parameters()
    rate = min(0.5, 1 / 10)
    assert apart(inside, {k: rate * start[k] + (1 - rate) * moved[k] for k in moved}) < EXACT
