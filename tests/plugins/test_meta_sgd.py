"""Meta-SGD and MAML++ against double loops in plain torch, in which the rates are tensors like any other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain import EXACT, LR, apart, bert, padded
from torch.func import functional_call
from torch.nn import functional

from hybridengine.errors import ConfigError
from hybridengine.plugin import ParamGroup
from hybridengine.seams import View
from hybridengine.stack import check_stack
from hybridengine.stack.plan import make_plan
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_config
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.meta.learned_rates import MAMLPlusPlus, MetaSGD
from hybridengine_plugins.meta.maml import MAML

CLOSE = 10 * EXACT  # sdpa and eager attention round differently, some 1e-13 a step


def _episode(seed=0):
    query = make_batch(4, 7, seed=seed)
    return replace(query, parts={"support": make_batch(3, 6, seed=seed + 50, first_row=100), "query": query})


class _Loop:
    """The double loop: weights and rates as leaves, one graph through all inner steps, descent of both."""

    def __init__(self, rates, weights, second=lambda step: True):
        self.model = bert(0.0, attn_implementation="eager")
        self.theta = {k: p.detach().clone().requires_grad_() for k, p in self.model.named_parameters()}
        self.alpha = {k: rates(p).requires_grad_() for k, p in self.theta.items()}
        self.weights, self.second = weights, second

    def loss(self, params, rows):
        return functional.cross_entropy(functional_call(self.model, params, (), rows.inputs).logits, rows.targets)

    def step(self, batch, step, rate_at):
        fast, total = dict(self.theta), 0.0
        for k, weight in enumerate(self.weights(step)):
            loss = self.loss(fast, batch.parts["support"])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            grads = grads if self.second(step) else [g.detach() for g in grads]
            fast = {n: x - rate_at(self.alpha[n], k) * g for (n, x), g in zip(fast.items(), grads, strict=True)}
            total = total + weight * self.loss(fast, batch)
        leaves = [*self.theta.values(), *self.alpha.values()]
        with torch.no_grad():
            for leaf, g in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
                leaf -= LR * g

    def state(self, name):
        rates = {f"{name}/{k.replace('.', '|')}": a.detach() for k, a in self.alpha.items()}
        return {**{k: p.detach() for k, p in self.theta.items()}, **rates}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("second", [True, False])
def test_meta_sgd_as_the_paper_has_it(second, scale):
    method = MetaSGD(inner_lr=0.2, inner_steps=2, first_order=not second)
    bench = set_up([method], bert(0.0), _episode(), lr=LR, loss_scale=scale)
    start = bench.parameters()
    loop = _Loop(lambda p: torch.full_like(p.detach(), 0.2), lambda step: [0.0, 1.0], lambda step: second)
    for step in range(3):
        bench.step([_episode(step)])
        loop.step(_episode(step), step, lambda alpha, k: alpha)
        assert apart(bench.parameters(), loop.state("meta-sgd")) < CLOSE
    rates = [k for k in start if k.startswith("meta-sgd/")]
    assert len(rates) == len(start) / 2
    assert sum(float((bench.parameters()[k] - start[k]).norm()) for k in rates) > 1e-3
    assert bench.effect("meta-sgd", "rate_gradient") > 0


def _annealed(step):
    """The authors' schedule for K = 3 within 2 steps: from a third each, and 0.01 at least."""
    return ([1 / 3] * 3, [1 / 6, 1 / 6, 2 / 3], [0.0, 0.0, 1.0])[step]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_maml_plus_plus_as_the_paper_has_it(scale):
    method = MAMLPlusPlus(inner_lr=0.2, inner_steps=3, multi_step=2, first_order_steps=1)
    bench = set_up([method], bert(0.0), _episode(), lr=LR, loss_scale=scale)
    loop = _Loop(lambda p: torch.full((3,), 0.2, dtype=torch.float64), _annealed, lambda step: step >= 1)
    for step in range(3):
        bench.step([_episode(step)])
        loop.step(_episode(step), step, lambda alpha, k: alpha[k])
        assert apart(bench.parameters(), loop.state("maml-plus-plus")) < CLOSE, step
    rates = [v for k, v in bench.parameters().items() if k.startswith("maml-plus-plus/")]
    assert max(float(r.std()) for r in rates) > 1e-6  # the steps' rates went apart
    assert bench.effect("maml-plus-plus", "rate_gradient") > 0


def test_weights_of_the_losses_sum_to_one_and_keep_a_floor():
    method = MAMLPlusPlus(inner_steps=4, multi_step=100)
    assert all(sum(method._weights(step)) == pytest.approx(1) for step in range(120))
    assert method._weights(99)[0] == pytest.approx(0.03 / 4) and method._weights(100) == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("make", [MetaSGD, lambda **o: MAMLPlusPlus(multi_step=0, first_order_steps=0, **o)])
def test_before_the_rates_move_the_weights_get_mamls_gradient(make):
    maml = set_up([MAML(inner_lr=0.3, inner_steps=2)], bert(), _episode()).gradients([_episode()])
    ours = set_up([make(inner_lr=0.3, inner_steps=2)], bert(), _episode()).gradients([_episode()])
    assert apart({k: g for k, g in ours.items() if "/" not in k}, maml) < EXACT


@pytest.mark.parametrize("make", [MetaSGD, MAMLPlusPlus])
def test_two_episodes_give_the_mean_and_padding_nothing(make):
    def gradients(*episodes):
        return set_up([make(inner_lr=0.2, inner_steps=2)], bert(0.0), _episode()).gradients(list(episodes))

    one, two = gradients(_episode(0)), gradients(_episode(1))
    assert apart(gradients(_episode(0), _episode(1)), {k: (one[k] + two[k]) / 2 for k in one}) < EXACT
    assert apart(gradients(padded(_episode(0), 3)), one) < EXACT


@pytest.mark.parametrize("make", [MetaSGD, MAMLPlusPlus])
def test_rates_have_their_own_learning_rate_and_no_decay(make):
    method = make(inner_steps=2, rate_lr=0.7)
    bench = set_up([method], bert(), _episode())
    *others, own = method.transform_param_groups(bench.run, [ParamGroup(dict(bench.run.may_optimise))])
    assert own.options == {"lr": 0.7, "weight_decay": 0.0}
    assert own.parameters and all(k.startswith(f"{method.name}/") for k in own.parameters)
    assert not any("/" in k for group in others for k in group.parameters)


@pytest.mark.parametrize("make", [MetaSGD, MAMLPlusPlus])
def test_at_test_time_the_learned_rates_step(make):
    """With rates of 0, adaptation leaves the model as it is, whatever adapt_lr says; else it moves it."""
    seen = []
    episodes = Episodes(ways=3, adapt_steps=4, adapt_lr=9.0)
    for rate in (0.0, 0.1):
        bench = set_up([episodes, make(inner_lr=rate, inner_steps=2)], bert(0.0), _episode())
        with bench.evaluation(), torch.no_grad():
            episodes.wrap_predict(lambda ctx, batch, view: seen.append(view.params), bench.ctx, _episode(), View(key=0))
    weights = {k: p for k, p in bench.parameters().items() if "/" not in k}
    assert all(torch.equal(seen[0][k], weights[k]) for k in weights)
    assert 0 < apart(seen[1], weights) < 1


def test_the_plan_shows_the_phases_of_maml_plus_plus():
    plus = MAMLPlusPlus(inner_steps=2, multi_step=4, first_order_steps=2)
    phases = make_plan(tiny_config(), [as_method(Episodes(ways=3, shots=2, queries=4)), as_method(plus)], 10).phases
    assert [(phase.start, phase.passes) for phase in phases] == [
        (0, "F6 H F6 H F12 b F12 b P S"),
        (2, "F6 H F6 H F12 b F12 b P S"),
        (4, "F6 H F6 H F12 b P S"),
    ]
    assert phases[0].relative_cost < phases[1].relative_cost


@pytest.mark.parametrize("make", [MetaSGD, MAMLPlusPlus])
def test_refusals(make):
    with pytest.raises(ConfigError, match=r"no support rows; add `episodes"):
        set_up([make()], bert(), make_batch()).step([make_batch()])
    with pytest.raises(ConfigError, match=r"inner_parameters \['nothing'\] match no trained parameter; name others"):
        set_up([make(inner_parameters=["nothing"])], bert(), _episode())
    episodes = Episodes(ways=3, adapt_parameters=["*"])
    bench = set_up([episodes, make(inner_parameters=["classifier*"])], bert(), _episode())
    with bench.evaluation(), pytest.raises(ConfigError, match=r"no step size for .*; remove `adapt_parameters`"):
        bench.ctx.predict(bench.ctx, _episode(), View(key=0))
    (problem,) = check_stack([as_method(make()), as_method(MAML())], {"episodes", "functional"})
    assert "'meta'" in problem and "remove" in problem
