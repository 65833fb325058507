"""Prototypical networks against the paper's formula in plain torch, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, key, padded
from torch.nn import functional

from hybridengine.errors import ConfigError
from hybridengine.seams import View, mix
from hybridengine.stack import check_stack
from hybridengine.stack.plan import make_plan
from hybridengine.stack.resolve import as_method
from hybridengine.testing import make_batch, set_up, tiny_bert, tiny_config, tiny_llama
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.vat import VAT
from hybridengine_plugins.meta.episodes import Episodes
from hybridengine_plugins.meta.maml import MAML
from hybridengine_plugins.meta.prototypical import Prototypical
from hybridengine_plugins.regularize.rdrop import RDrop


def _episode(seed=0):
    """Three classes, two support rows of each in no order, five queries."""
    query = make_batch(5, 7, seed=seed)
    support = make_batch(6, 8, seed=seed + 50, first_row=100)
    support = replace(support, targets=torch.tensor([2, 0, 1, 1, 0, 2]))
    return replace(query, parts={"support": support, "query": query})


def _embedded(plain, rows, seed, pooling):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = plain.model.bert(**rows.inputs).last_hidden_state
    if pooling == "first":
        return hidden[:, 0]
    return torch.stack([h[: int(m.sum())].mean(0) for h, m in zip(hidden, rows.inputs["attention_mask"], strict=True)])


def _loss(plain, batch, seed, metric="euclidean", temperature=32.0, pooling="mean"):
    """Equations 1 and 2, a class and a query at a time."""
    support = batch.parts["support"]
    rows = _embedded(plain, support, mix(seed, "support"), pooling)
    prototypes = [rows[support.targets == n].mean(0) for n in range(3)]
    losses = []
    for row, target in zip(_embedded(plain, batch, seed, pooling), batch.targets, strict=True):
        if metric == "euclidean":
            near = torch.stack([-((row - c) ** 2).sum() for c in prototypes])
        else:
            near = torch.stack([functional.cosine_similarity(row, c, dim=0) for c in prototypes])
        losses.append(-(near / temperature).log_softmax(0)[target])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(
    "options", [{}, {"metric": "cosine", "temperature": 0.2}, {"pooling": "first", "temperature": 2.0}], ids=str
)
def test_three_steps_as_the_paper_has_them(options, scale):
    bench = set_up([Prototypical(**options)], bert(), _episode(), lr=LR, loss_scale=scale)
    start, plain = bench.parameters(), Plain(bert())
    for step in range(3):
        terms = bench.step([_episode(step)])
        loss = _loss(plain, _episode(step), key(step), **options)
        assert float(terms["loss"]) == pytest.approx(loss.item(), rel=1e-10)
        plain.descend(plain.gradient(loss))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT
    assert apart(bench.parameters(), start) > 1e-3
    assert bench.effect("prototypical", "margin") > 0


def test_defaults_of_the_temperature():
    for metric, temperature in (("euclidean", 32.0), ("cosine", 0.1)):
        one = set_up([Prototypical(metric)], bert(), _episode()).gradients([_episode()])
        same = set_up([Prototypical(metric, temperature)], bert(), _episode()).gradients([_episode()])
        assert apart(one, same) < EXACT


def test_the_head_stays_as_it_is():
    gradients = set_up([Prototypical()], bert(), _episode()).gradients([_episode()])
    assert not any("classifier" in name or "pooler" in name for name in gradients)


def test_where_all_rows_are_alike_nothing_is_learned():
    """The neutral element: equal prototypes give every class the same probability and a gradient of 0."""
    batch = _episode()
    row = {k: v[:1].expand(6, -1) for k, v in batch.parts["support"].inputs.items()}
    batch = replace(batch, parts={"support": replace(batch.parts["support"], inputs=row)})
    bench = set_up([Prototypical()], bert(0.0), batch)
    terms = bench.step([batch])
    assert float(terms["loss"]) == pytest.approx(torch.log(torch.tensor(3.0)).item(), rel=1e-6)
    assert float(terms["gradient_norm"]) < 1e-12  # fp64 roundings of terms of order 1


def test_two_episodes_give_the_mean_and_padding_nothing():
    def gradients(*episodes):
        return set_up([Prototypical()], bert(0.0), _episode()).gradients(list(episodes))

    one, two = gradients(_episode(0)), gradients(_episode(1))
    assert apart(gradients(_episode(0), _episode(1)), {k: (one[k] + two[k]) / 2 for k in one}) < EXACT
    assert apart(gradients(padded(_episode(0), 3)), one) < EXACT


def test_evaluation_takes_the_prototypes_of_each_episode_and_adapts_nothing():
    bench = set_up([Prototypical(), Episodes(ways=3)], bert(), _episode())
    plain = Plain(bert(0.0))
    with bench.evaluation():
        prediction = bench.ctx.predict(bench.ctx, _episode(), View(key=0))
    loss = _loss(plain, _episode(), 0).item()
    assert float(prediction.terms["loss"][0]) / 5 == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(prediction.scores.sum(1), torch.ones(5, dtype=torch.float64))
    own = prediction.scores.gather(1, _episode().targets[:, None])
    assert float(-own.log().mean()) == pytest.approx(loss, rel=1e-9)


def test_rows_without_support_get_no_opinion_and_a_note():
    bench = set_up([Prototypical()], bert(), _episode())
    with bench.evaluation():
        scores = bench.ctx.predict(bench.ctx, make_batch(), View(key=0)).scores
    assert torch.equal(scores, torch.full((4, 3), 1 / 3))
    assert any("no classes" in note for note in bench.run.notes)


@pytest.mark.parametrize("inside", [FGM(epsilon=0.5), RDrop(alpha=1.0)], ids=["fgm", "rdrop"])
def test_layers_around_it_act_on_the_query_rows(inside):
    alone = set_up([Prototypical()], bert(), _episode()).gradients([_episode()])
    both = set_up([Prototypical(), inside], bert(), _episode()).gradients([_episode()])
    assert apart(both, alone) > 1e-3


def test_decoders_too():
    model = tiny_llama("AutoModelForSequenceClassification", num_labels=3, pad_token_id=0)
    terms = set_up([Prototypical()], model, _episode()).step([_episode()])
    assert float(terms["gradient_norm"]) > 0


def test_the_plan_encodes_support_and_query_once():
    methods = [as_method(Episodes(ways=3, shots=2, queries=4)), as_method(Prototypical())]
    (phase,) = make_plan(tiny_config(), methods, 10).phases
    assert phase.passes == "F6 F12 B S"


def test_refusals():
    model = bert()
    model.bert.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"nothing below the head is trained.*remove what"):
        set_up([Prototypical()], model, _episode()).step([_episode()])
    with pytest.raises(ConfigError, match="prototypical: this batch has no support rows; add"):
        set_up([Prototypical()], tiny_bert(num_labels=3), make_batch()).step([make_batch()])
    have = {"episodes", "labels", "functional"}
    for other, word in ((MAML(), "'meta'"), (VAT(), "logits of the model's head")):
        (problem,) = check_stack([as_method(Prototypical()), as_method(other)], have | {"embeddings", "dropout"})
        assert word in problem and "remove" in problem
