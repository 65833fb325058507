"""MAML against closed forms, a double loop in plain torch, and in company of other methods."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quadratic import SIZE, Quadratic, QuadraticTask, episode, matrix
from torch.func import functional_call
from torch.nn import functional

from hybridengine.errors import ConfigError
from hybridengine.stack.plan import make_plan
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_config, tiny_llama
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.meta.maml import MAML
from hybridengine_plugins.tasks.text_classification import TextClassification

A, START = matrix(), torch.linspace(-1, 1, SIZE, dtype=torch.float64)
EYE = torch.eye(SIZE, dtype=torch.float64)


def _quadratic(method, **options):
    return set_up([method], Quadratic(START), episode(0), task=QuadraticTask(A), **options)


def _closed_form(batch, rate, steps, first_order):
    """theta_K = s + (I - rate A)^K (theta - s), and the gradient of the query loss through it."""
    shrink = torch.linalg.matrix_power(EYE - rate * A, steps)
    support, query = batch.parts["support"].targets.mean(0), batch.targets.mean(0)
    gradient = A @ (support + shrink @ (START - support) - query)
    return gradient if first_order else shrink.T @ gradient


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_closed_form_on_a_quadratic(steps, first_order, scale):
    method = MAML(inner_lr=0.3, inner_steps=steps, first_order=first_order)
    gradient = _quadratic(method, loss_scale=scale).gradients([episode(0)])["theta"]
    expected = _closed_form(episode(0), 0.3, steps, first_order)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_first_and_second_order_differ():
    assert not torch.allclose(
        _closed_form(episode(0), 0.3, 1, False), _closed_form(episode(0), 0.3, 1, True), rtol=0.05
    )


def test_two_episodes_give_the_mean_in_any_order():
    gradients = [_quadratic(MAML(inner_lr=0.3)).gradients([episode(i)])["theta"] for i in (1, 2)]
    both = _quadratic(MAML(inner_lr=0.3)).gradients([episode(1), episode(2)])["theta"]
    swapped = _quadratic(MAML(inner_lr=0.3)).gradients([episode(2), episode(1)])["theta"]
    torch.testing.assert_close(both, sum(gradients) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both, swapped, rtol=1e-12, atol=1e-12)


# ---- a transformer ---------------------------------------------------------------------------------------------------


def _text_episode(seed=0):
    query = make_batch(4, 7, seed=seed)
    return replace(query, parts={"support": make_batch(3, 6, seed=seed + 50, first_row=100), "query": query})


def _mean_loss(model, params, batch, delta=None):
    inputs = {"attention_mask": batch.inputs["attention_mask"]}
    if delta is None:
        inputs["input_ids"] = batch.inputs["input_ids"]
    else:
        inputs["inputs_embeds"] = params["bert.embeddings.word_embeddings.weight"][batch.inputs["input_ids"]] + delta
    return functional.cross_entropy(functional_call(model, params, (), inputs).logits, batch.targets)


def _double_loop(model, batch, rate, steps, query_gradient, only=""):
    """MAML by the book: one graph through the inner loop, differentiated at the end."""
    base = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    fast = dict(base)
    inner = [k for k in fast if only in k]
    for _ in range(steps):
        loss = _mean_loss(model, fast, batch.parts["support"])
        grads = torch.autograd.grad(loss, [fast[k] for k in inner], create_graph=True)
        fast.update({k: fast[k] - rate * g for k, g in zip(inner, grads, strict=True)})
    grads = torch.autograd.grad(
        [fast[k] for k in fast],
        list(base.values()),
        grad_outputs=query_gradient(model, fast, batch),
        allow_unused=True,
    )
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(base.items(), grads, strict=True)}


def _clean(model, params, batch):
    leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
    return list(torch.autograd.grad(_mean_loss(model, leaves, batch), list(leaves.values())))


def _attacked(model, params, batch, epsilon=0.7):
    """Half the clean gradient and half that at the FGM delta, norms per row over real tokens."""
    leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
    zero = torch.zeros(*batch.inputs["input_ids"].shape, 32, dtype=torch.float64, requires_grad=True)
    *clean, g = torch.autograd.grad(_mean_loss(model, leaves, batch, zero), [*leaves.values(), zero])
    g = g * batch.inputs["attention_mask"][..., None]
    delta = epsilon * g / g.flatten(1).norm(dim=1)[:, None, None]
    hit = torch.autograd.grad(_mean_loss(model, leaves, batch, delta), list(leaves.values()))
    return [(a + b) / 2 for a, b in zip(clean, hit, strict=True)]


def _bert(**options):
    return tiny_bert(num_labels=3, **options).double()


def _compare(gradients, expected):
    assert set(gradients) <= set(expected)
    for name, value in expected.items():
        # fp64; sdpa's math path and eager attention round differently
        torch.testing.assert_close(gradients.get(name, torch.zeros_like(value)), value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("task", [None, TextClassification()], ids=["torch loss", "kernel loss"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_equals_a_double_loop_on_bert(scale, task):
    expected = _double_loop(_bert(attn_implementation="eager"), _text_episode(), 0.2, 2, _clean)
    bench = set_up([MAML(inner_lr=0.2, inner_steps=2)], _bert(), _text_episode(), loss_scale=scale, task=task)
    _compare(bench.gradients([_text_episode()]), expected)


def test_inner_patterns_give_anil():
    expected = _double_loop(_bert(attn_implementation="eager"), _text_episode(), 0.5, 2, _clean, only="classifier")
    method = MAML(inner_lr=0.5, inner_steps=2, inner_parameters=["classifier*"])
    _compare(set_up([method], _bert(), _text_episode()).gradients([_text_episode()]), expected)


@pytest.mark.parametrize("order", ["attack first", "meta first"])
def test_an_attack_on_the_query_rows_runs_inside(order):
    expected = _double_loop(_bert(attn_implementation="eager"), _text_episode(), 0.2, 2, _attacked)
    methods = [FGM(epsilon=0.7, weight=0.5), MAML(inner_lr=0.2, inner_steps=2)]
    bench = set_up(methods if order == "attack first" else methods[::-1], _bert(), _text_episode())
    _compare(bench.gradients([_text_episode()]), expected)
    bench.effects.flush()
    assert bench.effects.summary()["maml"]["shift"]["last"] > 0


@pytest.mark.parametrize("first_order", [False, True])
def test_inner_rate_zero_is_the_query_gradient_under_the_same_dropout(first_order):
    options = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    plain = set_up([], _bert(**options), _text_episode()).gradients([make_batch(4, 7)])
    method = MAML(inner_lr=0.0, inner_steps=2, first_order=first_order)
    meta = set_up([method], _bert(**options), _text_episode()).gradients([_text_episode()])
    assert set(plain) == set(meta)
    for name, value in plain.items():
        torch.testing.assert_close(meta[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_decoders_have_second_derivatives_too():
    model = tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0).double()
    second = set_up([MAML(inner_lr=0.2)], model, _text_episode()).gradients([_text_episode()])
    first = set_up([MAML(inner_lr=0.2, first_order=True)], model, _text_episode()).gradients([_text_episode()])
    assert all(torch.isfinite(g).all() for g in second.values())
    assert max(float((second[k] - first[k]).abs().max()) for k in second) > 1e-4


def test_the_inner_loop_takes_the_terms_of_the_stack_only_when_asked():

    results = {}
    for kind in ("task", "full"):
        bench = set_up([MAML(inner_lr=0.3, inner_loss=kind)], Quadratic(START), episode(0), task=QuadraticTask(A))
        leaf = bench.ctx.loss
        bench.ctx.loss = lambda ctx, batch, view, leaf=leaf: _doubled(leaf(ctx, batch, view))
        results[kind] = bench.gradients([episode(0)])["theta"]
    support, query = episode(0).parts["support"].targets.mean(0), episode(0).targets.mean(0)
    for kind, factor in (("task", 1.0), ("full", 2.0)):
        shrink = EYE - 0.3 * factor * A
        expected = shrink.T @ (2 * A @ (support + shrink @ (START - support) - query))
        torch.testing.assert_close(results[kind], expected, rtol=1e-12, atol=1e-12)


def _doubled(out):
    return replace(out, terms={**out.terms, "again": out.terms["loss"]})


def test_weights_do_not_move_before_the_update():
    bench = set_up([MAML(inner_lr=0.3, inner_steps=2)], _bert(), _text_episode())
    before = bench.parameters()
    bench.step([_text_episode()])
    assert all(torch.equal(before[k], p) for k, p in bench.parameters().items())


def test_refuses_rows_without_episodes_and_patterns_without_match():
    with pytest.raises(ConfigError, match="episodes"):
        set_up([MAML()], _bert(), make_batch()).step([make_batch()])
    with pytest.raises(ConfigError, match="match no trained parameter"):
        set_up([MAML(inner_parameters=["head*"])], _bert(), make_batch()).step([_text_episode()])


def test_the_plan_shows_inner_loop_and_pull_back():
    methods = [as_method(Episodes(ways=3, shots=2, queries=4)), as_method(MAML(inner_steps=2))]
    (phase,) = make_plan(tiny_config(accumulate=2), methods, 10).phases
    assert phase.passes == "F6 H F6 H F12 b P F6 H F6 H F12 b P S"
