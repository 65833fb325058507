"""L2-SP against its definition, once a step, restored from checkpoints' state."""

from __future__ import annotations

from typing import Any

import torch
from plain import EXACT, LR, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, key
from torch import Tensor

from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.regularize.l2_sp import L2SP


def is_new(name: str) -> bool:
    return name.startswith("classifier")


def test_three_steps_match_the_definition() -> None:
    bench = set_up([L2SP(alpha=0.3, beta=0.7)], bert(), make_batch(), lr=LR)
    plain, batch = Plain(bert()), make_batch()
    start = {k: p.detach().clone() for k, p in plain.parameters.items()}
    for step in range(3):
        bench.step([batch])
        penalty: Any = 0.0
        for name, p in plain.parameters.items():
            penalty = penalty + (0.35 * p.square().sum() if is_new(name) else 0.15 * (p - start[name]).square().sum())
        grads = plain.gradient(plain.loss(batch, key(step)) + penalty)
        with torch.no_grad():
            for name, g in grads.items():
                plain.parameters[name].sub_(LR * g)
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT


def test_zero_is_plain_training_and_the_first_step_moves_the_head_alone() -> None:
    batch = make_batch()
    plain = gradients(list, [batch], bert())
    assert apart(gradients(lambda: [L2SP(alpha=0.0, beta=0.0)], [batch], bert()), plain) == 0.0
    first = gradients(lambda: [L2SP(alpha=9.0, beta=1.0)], [batch], bert())
    head = dict(bert().named_parameters())
    for name, g in first.items():
        expected = plain[name] + head[name].detach() if is_new(name) else plain[name]
        torch.testing.assert_close(g, expected, rtol=1e-13, atol=1e-13)


def test_invariants() -> None:
    for stack in (lambda: [L2SP(alpha=0.5)], lambda: [L2SP(alpha=0.5), SAM(rho=0.1)]):
        check_accumulation(stack)
        check_padding(stack)
        check_loss_scale(stack)


def test_what_state_holds_is_where_it_pulls_to() -> None:
    """A run that goes on has the start in its state, not the weights that it goes on from."""
    whole = set_up([L2SP(alpha=0.5)], bert(0.0), make_batch(), lr=LR)
    for _ in range(2):
        whole.step([make_batch()])
    half = set_up([L2SP(alpha=0.5)], bert(0.0), make_batch(), lr=LR)
    half.step([make_batch()])
    later = set_up([L2SP(alpha=0.5)], bert(0.0), make_batch(), lr=LR)
    with torch.no_grad():
        for name, p in later.run.may_optimise.items():
            p.copy_(half.run.may_optimise[name])
    kept: dict[str, Tensor] = half.run.state("l2-sp")
    later.run.state("l2-sp").update(kept)
    later.step([make_batch()])
    assert apart(later.parameters(), whole.parameters()) == 0.0
    assert kept and not any(is_new(name) for name in kept)


def test_a_strong_pull_keeps_the_weights_near() -> None:
    ways = []
    for alpha in (0.0, 100.0):
        bench = set_up([L2SP(alpha=alpha)], bert(0.0), make_batch(), lr=0.005)
        before = bench.parameters()
        for _ in range(6):
            bench.step([make_batch()])
        old = [name for name in before if not is_new(name)]
        ways.append(sum(float((bench.parameters()[name] - before[name]).norm()) for name in old))
    assert 0 < ways[1] < 0.7 * ways[0]
