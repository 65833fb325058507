"""UDA against a reference written from the paper, its invariants, and how rewritten rows reach training."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain import (
    EXACT,
    LR,
    Plain,
    Spy,
    apart,
    bert,
    check_accumulation,
    check_loss_scale,
    check_padding,
    check_restores,
    gradients,
    key,
    unlabelled_parts,
)
from texts import make_run, splits_of
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import StackError
from hybridengine.plugin import Split
from hybridengine.seams import Batch, mix
from hybridengine.seams.trace import cost_of
from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.data.eda import EDA, augment
from hybridengine_plugins.data.uda import UDA
from hybridengine_plugins.regularize.rdrop import RDrop

T = 100  # steps of the bench


def whole(seed: int = 0, size: int = 6) -> Batch:
    return make_batch(seed=seed, parts=unlabelled_parts(size))


def reference(plain: Plain, batch: Batch, step: int, method: UDA) -> dict[str, Tensor]:
    """Xie et al., sections 2.2 and 2.3, with the labelled rows as the fixed denominator."""
    seed, total = key(step), len(batch.targets)
    logits = plain.logits(batch, seed)
    truth = logits.log_softmax(-1)[torch.arange(total), batch.targets]
    s, classes = step / T, logits.shape[-1]
    grown = {"linear": s, "log": 1 - math.exp(-s * 5), "exp": math.exp((s - 1) * 5), "none": math.inf}
    keep = truth.exp() <= grown[method.annealing] * (1 - 1 / classes) + 1 / classes
    supervised = -(truth * keep).sum() / total
    part, rewritten = batch.parts["unlabelled"], batch.parts["augmented"]
    fixed = plain.logits(part, mix(seed, "unlabelled")).detach()
    moved = plain.logits(rewritten, mix(seed, "augmented"))
    q, log_p = (fixed / method.temperature).softmax(-1), moved.log_softmax(-1)
    divergence = (q * (q.log() - log_p)).sum(-1)
    sure = fixed.softmax(-1).max(-1).values > method.threshold
    return plain.gradient(supervised + method.weight * (divergence * sure).sum() / len(sure))


@pytest.mark.parametrize(
    "method",
    [
        UDA(),
        UDA(weight=0.7, temperature=0.4),
        UDA(threshold=0.42, temperature=0.8),
        *(UDA(annealing=kind) for kind in ("linear", "log", "exp")),
    ],
    ids=lambda method: f"{method.threshold}-{method.annealing}-{method.temperature}",
)
def test_matches_the_paper(method: UDA) -> None:
    batches = [whole(seed) for seed in range(3)]
    bench, plain = set_up([method], bert(), batches[0], lr=LR), Plain(bert())
    start, sure, dropped = bench.parameters(), [], []
    for step, batch in enumerate(batches):
        bench.step([batch])
        plain.descend(reference(plain, batch, step, method))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT, step
        sure.append(bench.effect("uda", "sure"))
        dropped.append(bench.effect("uda", "dropped") if method.annealing != "none" else 0.5)
    assert apart(bench.parameters(), start) > 1e-3
    assert 0 < sum(sure) / 3 < 1 if method.threshold else sure == [1, 1, 1]
    assert 0 < sum(dropped) / 3 < 1


def test_weight_zero_is_plain_training() -> None:
    batch = whole()
    assert apart(gradients(lambda: [UDA(weight=0.0)], [batch], bert()), gradients(list, [batch], bert())) < EXACT


def test_rows_that_nobody_is_sure_of_do_not_count() -> None:
    batch = whole()
    made = gradients(lambda: [UDA(threshold=0.999)], [batch], bert())
    assert apart(made, gradients(list, [batch], bert())) < EXACT


def test_equal_texts_and_no_dropout_have_no_divergence() -> None:
    parts = unlabelled_parts()
    batch = make_batch(parts={**parts, "augmented": replace(parts["unlabelled"], rows=(9, 8, 7, 6))})
    assert float(set_up([UDA()], bert(0.0), batch).step([batch])["uda"]) == pytest.approx(0, abs=1e-15)
    assert float(set_up([UDA()], bert(), batch).step([batch])["uda"]) > 1e-4  # masks of its own


def test_no_gradient_flows_into_the_prediction_on_the_unlabelled_text() -> None:
    """With only that side depending on a parameter, nothing moves it."""
    batch = whole()
    bench = set_up([UDA(weight=5.0)], bert(0.0), batch, lr=0.0)
    watched = bench.run.model.bert.embeddings.word_embeddings.weight
    ids = batch.parts["unlabelled"].inputs["input_ids"]
    others = torch.cat([batch.inputs["input_ids"].flatten(), batch.parts["augmented"].inputs["input_ids"].flatten()])
    alone = sorted(set(ids.flatten().tolist()) - set(others.tolist()))
    bench.step([batch])
    assert alone and float(watched.grad[alone].abs().max()) == 0
    assert float(watched.grad[batch.parts["augmented"].inputs["input_ids"]].abs().max()) > 0


@pytest.mark.parametrize("annealing", ["none", "linear"])
def test_invariants(annealing: Any) -> None:
    def stack() -> list[object]:
        return [UDA(temperature=0.5, threshold=0.43, annealing=annealing)]  # four of eight rows are surer

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=2 if annealing == "linear" else 1)  # the batch has no unlabelled part


def test_an_attack_on_labelled_rows_does_not_reach_the_others() -> None:
    batch, spy = whole(), Spy()

    def term(epsilon: float) -> Tensor:
        return set_up([UDA(), FGM(epsilon=epsilon)], bert(), batch, task=spy).step([batch])["uda"]

    assert torch.equal(term(0.0), term(2.0))


def test_passes_and_cost() -> None:
    for method, text, cost in ((UDA(), "F4 f4 F4 B S", 7), (UDA(annealing="exp"), "f4 F4 f4 F4 B S", 8)):
        batch = whole(size=4)
        bench = set_up([method], bert(), batch)
        bench.step([batch])
        assert bench.ctx.trace.text() == text
        assert cost_of(bench.ctx.trace.events, 4) == cost
    assert bench.effect("uda", "kl") > 0


def test_annealing_reaches_the_terms_of_inner_methods() -> None:
    """What R-Drop averages over its passes is the loss on the labels that still count."""
    batch = whole(size=4)
    bench = set_up([RDrop(alpha=0.0), UDA(annealing="exp")], bert(0.0), batch)
    terms = bench.step([batch])
    logits = Plain(bert(0.0)).logits(batch, 0)
    ce = functional.cross_entropy(logits, batch.targets, reduction="none")
    keep = (-ce).exp() <= 1 / 3 + 2 / 3 * math.exp(-5)
    assert 0 < int(keep.sum()) < 4
    torch.testing.assert_close(terms["loss"], (ce * keep).sum().detach() / 4)


# ---- how rewritten rows reach training -----------------------------------------------------------------------------


def unlabelled_splits() -> dict[str, Split]:
    rows = [{"text": text} for text in ("good movie and plot", "awful food", "the very best actor")]
    return {**splits_of(["a b", "c d"]), "unlabelled": Split("unlabelled", rows, "u.csv", [5, 6, 7])}


def test_every_unlabelled_row_is_rewritten_by_each_method_in_turn() -> None:
    run, splits = make_run(4), unlabelled_splits()
    assert EDA(0.5, 0).transform_data(run, splits) is None and "eda: no copies" in run.notes[0]
    run.rewrites["shout"] = lambda rows, keys: [row["text"].upper() for row in rows]
    out = UDA().transform_data(run, splits)
    assert out is not None and out["train"] is splits["train"] and out["unlabelled"] is splits["unlabelled"]
    for position, row in enumerate(out["augmented"].rows):
        identity = splits["unlabelled"].ids([position])[0]
        text = splits["unlabelled"].rows[position]["text"]
        wanted = augment(text, 0.5, {}, random.Random(mix(4, "eda", identity, 0))).upper()
        assert row == {"text": wanted, "augmented_from": position}
        assert out["augmented"].where(position) == splits["unlabelled"].where(position)
    assert not set(out["augmented"].ids(range(3))) & set(splits["unlabelled"].ids(range(3)))


def test_refusals() -> None:
    with pytest.raises(StackError, match="needs texts that another method rewrites before it; add eda"):
        UDA().transform_data(make_run(), unlabelled_splits())
    with pytest.raises(StackError, match="one label for each row"):
        UDA().transform_data(make_run(text="text", summary="summary"), unlabelled_splits())
    assert UDA().transform_data(make_run(), splits_of(["a"])) is None  # the missing capability is told by the stack
