"""Reptile against its closed form, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quadratic import SIZE, Quadratic, QuadraticTask, episode, matrix

from hybridengine.errors import ConfigError
from hybridengine.stack import check_stack
from hybridengine.stack.plan import make_plan
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_config
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.vat import VAT
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.meta.reptile import Reptile

A, START = matrix(1), torch.linspace(-1, 1, SIZE, dtype=torch.float64)


def _bench(method, **options):
    return set_up([method], Quadratic(START), episode(0), task=QuadraticTask(A), **options)


def _way(batch, rate, steps):
    """theta - theta_K for theta_{k+1} - c_k = (I - rate A)(theta_k - c_k), support and query in turn."""
    shrink = torch.eye(SIZE, dtype=torch.float64) - rate * A
    at = START
    for step in range(steps):
        centre = (batch.parts["support"] if step % 2 == 0 else batch).targets.mean(0)
        at = centre + shrink @ (at - centre)
    return START - at


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("steps", [2, 3])
def test_closed_form_on_a_quadratic(steps, scale):
    bench = _bench(Reptile(inner_lr=0.3, inner_steps=steps), loss_scale=scale)
    gradient = bench.gradients([episode(0)])["theta"]
    torch.testing.assert_close(gradient, _way(episode(0), 0.3, steps), rtol=1e-12, atol=1e-12)


def test_two_episodes_give_the_mean():
    gradient = _bench(Reptile(inner_lr=0.3, inner_steps=3)).gradients([episode(1), episode(2)])["theta"]
    expected = (_way(episode(1), 0.3, 3) + _way(episode(2), 0.3, 3)) / 2
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_plain_sgd_moves_to_the_end_of_the_way():
    bench = _bench(Reptile(inner_lr=0.3, inner_steps=2), lr=1.0)
    bench.step([episode(0)])
    torch.testing.assert_close(bench.parameters()["theta"], START - _way(episode(0), 0.3, 2), rtol=1e-12, atol=1e-12)


def test_unlabelled_rows_take_part_in_the_steps_on_query_rows():
    """They are counted among `all_rows`, so that without them the term would be a part of what it should be."""
    query = make_batch(4, 7)
    parts = {"support": make_batch(3, 6, seed=9, first_row=50), "query": query}
    unlabelled = make_batch(6, 6, seed=5, first_row=90)
    counts = {**query.counts, "all_rows": 10}
    batch = replace(query, parts={**parts, "unlabelled": unlabelled}, counts=counts)
    bench = set_up([Reptile(inner_steps=2), VAT()], tiny_bert(num_labels=3), batch)
    terms = bench.step([batch])
    assert bench.ctx.trace.text().count("F6") == 2  # the divergence of the six unlabelled rows, in the second step
    assert float(terms["vat_unlabelled"]) > 0


def test_on_bert_only_chosen_parameters_get_a_gradient_and_weights_stay():
    query = make_batch(4, 7)
    batch = replace(query, parts={"support": make_batch(3, 6, seed=9, first_row=50), "query": query})
    bench = set_up([Reptile(inner_parameters=["classifier*"])], tiny_bert(num_labels=3), batch)
    before = bench.parameters()
    assert set(bench.gradients([batch])) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(before[k], p) for k, p in bench.parameters().items())


def test_an_attack_inside_is_refused_since_it_would_be_ignored():
    methods = [as_method(x) for x in (FGM(), Episodes(), Reptile())]
    (problem,) = check_stack(methods, {"labels", "functional", "embeddings"})
    assert "fgm" in problem and "reptile" in problem and "remove" in problem


def test_needs_episodes():
    with pytest.raises(ConfigError, match="episodes"):
        set_up([Reptile()], tiny_bert(num_labels=3), make_batch()).step([make_batch()])
    problems = check_stack([as_method(Reptile())], {"labels", "functional"})
    assert len(problems) == 1 and "episodes: {ways" in problems[0]


def test_the_plan_runs_it():
    methods = [as_method(Episodes(ways=3, shots=2, queries=4)), as_method(Reptile(inner_steps=3))]
    (phase,) = make_plan(tiny_config(), methods, 10).phases
    assert phase.passes == "F6 H F12 H F6 H S"
