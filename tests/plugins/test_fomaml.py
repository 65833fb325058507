"""First-order MAML: a plain-torch loop over three steps, the neutral rate, and `maml: {first_order: true}`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, padded
from torch.func import functional_call
from torch.nn import functional

from hybridengine.errors import ConfigError
from hybridengine.stack import check_stack
from hybridengine.stack.plan import make_plan
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_config
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.meta.maml import FOMAML, MAML


def _episode(seed=0, **options):
    query = make_batch(4, 7, seed=seed, **options)
    return replace(query, parts={"support": make_batch(3, 6, seed=seed + 50, first_row=100), "query": query})


def _reference(plain, batch, rate, steps):
    """Section 5.2: adapt by plain gradients, take the query gradient there."""
    fast = {k: p.detach().clone() for k, p in plain.parameters.items()}

    def gradient(rows):
        leaves = {k: p.detach().requires_grad_() for k, p in fast.items()}
        loss = functional.cross_entropy(functional_call(plain.model, leaves, (), rows.inputs).logits, rows.targets)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    for _ in range(steps):
        fast = {k: fast[k] - rate * g for k, g in gradient(batch.parts["support"]).items()}
    return gradient(batch)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_three_steps_as_the_paper_has_them(scale):
    method = FOMAML(inner_lr=0.3, inner_steps=2)
    bench = set_up([method], bert(0.0), _episode(), lr=LR, loss_scale=scale)
    start, plain = bench.parameters(), Plain(bert(0.0))
    for step in range(3):
        bench.step([_episode(step)])
        plain.descend(_reference(plain, _episode(step), 0.3, 2))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT
    assert apart(bench.parameters(), start) > 1e-3
    assert bench.effect("fomaml", "shift") > 0


def test_is_maml_without_second_derivatives():
    options = {"inner_lr": 0.3, "inner_steps": 2}
    one = set_up([FOMAML(**options)], bert(), _episode()).gradients([_episode()])
    same = set_up([MAML(first_order=True, **options)], bert(), _episode()).gradients([_episode()])
    other = set_up([MAML(**options)], bert(), _episode()).gradients([_episode()])
    assert all(torch.equal(one[k], same[k]) for k in same)
    assert apart(one, other) > 1e-3


def test_at_rate_zero_it_is_plain_training_on_the_query_rows():
    plain = set_up([], bert(), _episode()).gradients([make_batch(4, 7)])
    meta = set_up([FOMAML(inner_lr=0.0, inner_steps=2)], bert(), _episode()).gradients([_episode()])
    assert apart(meta, plain) < EXACT


def test_two_episodes_give_the_mean_and_padding_nothing():
    def gradients(*episodes):
        return set_up([FOMAML(inner_lr=0.3)], bert(0.0), _episode()).gradients(list(episodes))

    one, two = gradients(_episode(0)), gradients(_episode(1))
    both = gradients(_episode(0), _episode(1))
    assert apart(both, {k: (one[k] + two[k]) / 2 for k in one}) < EXACT
    assert apart(gradients(padded(_episode(0), 3)), one) < EXACT


def test_the_plan_shows_no_second_derivatives():
    methods = [as_method(Episodes(ways=3, shots=2, queries=4)), as_method(FOMAML(inner_steps=2))]
    (phase,) = make_plan(tiny_config(), methods, 10).phases
    assert phase.passes == "F6 H F6 H F12 b P S"
    second = make_plan(tiny_config(), [methods[0], as_method(MAML(inner_steps=2))], 10).phases[0]
    assert phase.relative_cost < second.relative_cost


def test_refusals_name_it():
    with pytest.raises(ConfigError, match="fomaml: this batch has no support rows; add"):
        set_up([FOMAML()], bert(), make_batch()).step([make_batch()])
    with pytest.raises(ConfigError, match=r"fomaml: inner_parameters \['nothing'\] match no"):
        set_up([FOMAML(inner_parameters=["nothing"])], bert(), _episode()).step([_episode()])
    two = check_stack([as_method(FOMAML()), as_method(MAML())], {"episodes", "functional"})
    assert any("'meta'" in problem and "remove" in problem for problem in two)
    with pytest.raises(TypeError):
        FOMAML(first_order=False)
