"""ANIL: an inner loop over the head alone, by a double loop in plain torch, in training and at test time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, padded
from torch.func import functional_call
from torch.nn import functional

from hybridengine.errors import ConfigError
from hybridengine.seams import View
from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.meta.maml import ANIL, MAML

HEAD = ("classifier.weight", "classifier.bias")


def _episode(seed=0):
    query = make_batch(4, 7, seed=seed)
    return replace(query, parts={"support": make_batch(3, 6, seed=seed + 50, first_row=100), "query": query})


def _model():
    return bert(0.0, attn_implementation="eager")


def _loss(plain, params, rows):
    return functional.cross_entropy(functional_call(plain.model, params, (), rows.inputs).logits, rows.targets)


def _reference(plain, batch, rate, steps, first_order=False):
    """The head descends on the support rows; everything is differentiated through that."""
    fast = dict(plain.parameters)
    for _ in range(steps):
        loss = _loss(plain, fast, batch.parts["support"])
        grads = torch.autograd.grad(loss, [fast[k] for k in HEAD], create_graph=not first_order)
        fast.update({k: fast[k] - rate * g for k, g in zip(HEAD, grads, strict=True)})
    return plain.gradient(_loss(plain, fast, batch))


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_three_steps_as_the_paper_has_them(scale, first_order):
    method = ANIL(inner_lr=0.8, inner_steps=3, first_order=first_order)
    bench = set_up([method], bert(0.0), _episode(), lr=LR, loss_scale=scale)
    start, plain = bench.parameters(), Plain(_model())
    for step in range(3):
        bench.step([_episode(step)])
        plain.descend(_reference(plain, _episode(step), 0.8, 3, first_order))
        ours = {k: p for k, p in bench.parameters().items() if k in plain.parameters}
        # sdpa and eager attention round differently, some 1e-13 a step
        assert apart(ours, {k: p.detach() for k, p in plain.parameters.items()}) < 10 * EXACT
    assert apart(bench.parameters(), start) > 1e-3
    assert bench.effect("anil", "shift") > 0


def test_the_body_gets_its_gradient_through_the_inner_steps():
    first = set_up([ANIL(inner_lr=0.8, first_order=True)], bert(0.0), _episode()).gradients([_episode()])
    second = set_up([ANIL(inner_lr=0.8)], bert(0.0), _episode()).gradients([_episode()])
    body = next(k for k in second if "query.weight" in k)
    assert float((first[body] - second[body]).norm()) > 1e-4


def test_is_maml_of_the_heads_parameters():
    one = set_up([ANIL(inner_lr=0.8, inner_steps=2)], bert(), _episode()).gradients([_episode()])
    maml = MAML(inner_lr=0.8, inner_steps=2, inner_parameters=["classifier*"])
    same = set_up([maml], bert(), _episode()).gradients([_episode()])
    assert apart(one, same) < EXACT


def test_at_rate_zero_it_is_plain_training_on_the_query_rows():
    plain = set_up([], bert(), _episode()).gradients([make_batch(4, 7)])
    assert apart(set_up([ANIL(inner_lr=0.0)], bert(), _episode()).gradients([_episode()]), plain) < EXACT


def test_two_episodes_give_the_mean_and_padding_nothing():
    def gradients(*episodes):
        return set_up([ANIL(inner_lr=0.8)], bert(0.0), _episode()).gradients(list(episodes))

    one, two = gradients(_episode(0)), gradients(_episode(1))
    assert apart(gradients(_episode(0), _episode(1)), {k: (one[k] + two[k]) / 2 for k in one}) < EXACT
    assert apart(gradients(padded(_episode(0), 3)), one) < EXACT


def test_at_test_time_the_head_alone_adapts_unless_told_otherwise():
    seen = []
    for patterns in ([], ["*"]):
        method = Episodes(ways=3, adapt_parameters=patterns)
        bench = set_up([method, ANIL()], bert(0.0), _episode())
        with bench.evaluation(), torch.no_grad():
            method.wrap_predict(lambda ctx, batch, view: seen.append(view.params), bench.ctx, _episode(), View(key=0))
    assert set(seen[0]) == set(HEAD) and len(seen[1]) == len(bench.parameters())


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"anil: inner_parameters \['nothing'\] match no trained parameter"):
        set_up([ANIL(inner_parameters=["nothing"])], bert(), _episode()).step([_episode()])
