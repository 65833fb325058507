"""Self-training against a reference written from FixMatch and FreeMatch, and its invariants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain import (
    EXACT,
    LR,
    Plain,
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

from hybridengine.errors import NoEffectError, StackError
from hybridengine.plugin import Split
from hybridengine.seams import Batch, mix
from hybridengine.seams.trace import cost_of
from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.data.eda import EDA
from hybridengine_plugins.data.self_training import SelfTraining
from hybridengine_plugins.data.uda import UDA


def whole(seed: int = 0, size: int = 6, augmented: bool = True) -> Batch:
    parts = {
        name: replace(make_batch(size, seed=start + seed, first_row=100 * start), targets=None)
        for name, start in (("unlabelled", 10), ("augmented", 20))
    }
    return make_batch(seed=seed, parts=parts if augmented else {"unlabelled": parts["unlabelled"]})


class Reference:
    """FixMatch's loss (Sohn et al., eq. 4) under FreeMatch's thresholds (Wang et al., eqs. 5, 6, 8), a step late."""

    def __init__(self, method: SelfTraining) -> None:
        self.method = method
        self.mean, self.confidence = [1 / 3] * 3, 1 / 3
        self.labels: list[list[int | None]] = []

    def gradient(self, plain: Plain, batch: Batch, step: int) -> dict[str, Tensor]:
        method, seed, part = self.method, key(step), batch.parts["unlabelled"]
        with torch.no_grad():
            q = plain.logits(part, mix(seed, "unlabelled")).softmax(-1).tolist()
        scale = [m / max(self.mean) if method.balance else 1.0 for m in self.mean]
        level = self.confidence if method.threshold is None else method.threshold
        moved = plain.logits(batch.parts.get("augmented", part), mix(seed, "augmented")).log_softmax(-1)
        loss, labels = plain.loss(batch, seed), []
        for row, probabilities in enumerate(q):
            guess = max(range(3), key=lambda c: probabilities[c])
            if probabilities[guess] > level * scale[guess]:
                loss = loss - method.weight * moved[row, guess] / len(q)
                labels.append(guess)
            else:
                labels.append(None)
        self.labels.append(labels)
        keep = method.memory
        self.mean = [keep * m + (1 - keep) * sum(p[c] for p in q) / len(q) for c, m in enumerate(self.mean)]
        self.confidence = keep * self.confidence + (1 - keep) * sum(max(p) for p in q) / len(q)
        return plain.gradient(loss)


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        SelfTraining(memory=0.1),
        SelfTraining(memory=0.0, balance=False, weight=0.6),
        SelfTraining(threshold=0.42, memory=0.2),
        SelfTraining(threshold=0.42, balance=False),
    ],
    ids=lambda method: f"{method.threshold}-{method.balance}",
)
def test_matches_the_papers(method: SelfTraining, augmented: bool) -> None:
    batches = [whole(seed, augmented=augmented) for seed in range(3)]
    bench, plain, reference = set_up([method], bert(), batches[0], lr=LR), Plain(bert()), Reference(method)
    start = bench.parameters()
    for step, batch in enumerate(batches):
        bench.step([batch])
        plain.descend(reference.gradient(plain, batch, step))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT, step
        given = sum(label is not None for label in reference.labels[-1])
        assert bench.effect("self-training", "labelled") == pytest.approx(given / 6)
    assert apart(bench.parameters(), start) > 1e-3
    given = [label for labels in reference.labels for label in labels]
    assert 0 < given.count(None) < len(given) and len(set(given)) > 2
    state = bench.run.state("self-training")
    assert state["mean"].tolist() == pytest.approx(reference.mean, abs=1e-12)
    assert float(state["confidence"]) == pytest.approx(reference.confidence, abs=1e-12)


def test_weight_zero_and_labels_for_no_row_are_plain_training() -> None:
    batch = whole()
    plain = gradients(list, [batch], bert())
    for method in (SelfTraining(weight=0.0), SelfTraining(threshold=0.999, balance=False)):
        assert apart(gradients(lambda method=method: [method], [batch], bert()), plain) < EXACT


@pytest.mark.parametrize("options", [{}, {"threshold": 0.43, "balance": False}])
def test_invariants(options: Any) -> None:
    def stack() -> list[object]:
        return [SelfTraining(**options)]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=1)


@pytest.mark.parametrize("around", [list, lambda: [FGM()], lambda: [SAM()]], ids=["alone", "fgm", "sam"])
def test_running_means_do_not_depend_on_micro_batches(around: Any) -> None:
    """Thresholds stay while a step lasts, and its predictions count once it is over."""
    from plain import rows_of

    batch = rows_of(make_batch(8, 9, parts=unlabelled_parts(8, 9)), 0, 8)
    states = []
    for size in (8, 2):
        bench = set_up([SelfTraining(memory=0.5), *around()], bert(0.0), batch, lr=LR)
        for _ in range(3):
            bench.step([rows_of(batch, i, i + size) for i in range(0, 8, size)])
        states.append(bench.run.state("self-training"))
    for name in ("mean", "confidence"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=1e-10)
    assert float((states[0]["mean"] - 1 / 3).abs().max()) > 0.01


def test_rarely_predicted_classes_have_lower_thresholds() -> None:
    batch = whole()
    method = SelfTraining(threshold=0.9)
    bench = set_up([method], bert(), batch)
    bench.run.state("self-training").update(mean=torch.tensor([0.6, 0.3, 0.1]), confidence=torch.tensor(0.5))
    found = method._thresholds(bench.ctx, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.9, 0.45, 0.15]).double(), rtol=0, atol=1e-7)


def test_no_gradient_flows_into_the_labels() -> None:
    batch = whole()
    bench = set_up([SelfTraining(weight=5.0)], bert(0.0), batch, lr=0.0)
    watched = bench.run.model.bert.embeddings.word_embeddings.weight
    ids = {name: set(part.inputs["input_ids"].flatten().tolist()) for name, part in batch.parts.items()}
    alone = sorted(ids["unlabelled"] - ids["augmented"] - set(batch.inputs["input_ids"].flatten().tolist()))
    bench.step([batch])
    assert alone and float(watched.grad[alone].abs().max()) == 0
    assert float(watched.grad[sorted(ids["augmented"])].abs().max()) > 0


def test_passes_and_cost() -> None:
    batch = whole(size=4)
    bench = set_up([SelfTraining(start=1)], bert(), batch)
    for text, cost in (("F4 B S", 3), ("F4 f4 F4 B S", 7)):
        bench.step([batch])
        assert bench.ctx.trace.text() == text
        assert cost_of(bench.ctx.trace.events, 4) == cost
    assert bench.effect("self-training", "labelled") > 0


def test_a_threshold_that_no_row_reaches_stops_the_run() -> None:
    batch = whole()
    bench = set_up([SelfTraining(threshold=0.999, balance=False)], bert(), batch, lr=0.0)
    with pytest.raises(NoEffectError, match="self-training"):
        for _ in range(20):
            bench.step([batch])


def test_unlabelled_rows_are_rewritten_once_where_a_method_does_it() -> None:
    def splits() -> dict[str, Split]:
        return {**splits_of(["a b"]), "unlabelled": Split("unlabelled", [{"text": "good movie and plot"}] * 4)}

    assert SelfTraining().transform_data(make_run(), splits()) is None
    run = make_run()
    EDA(0.5, 0).transform_data(run, splits())
    once = UDA().transform_data(run, splits())
    twice = SelfTraining().transform_data(run, once or {})
    assert once is not None and twice is not None and twice["augmented"] is once["augmented"]
    with pytest.raises(StackError, match=r"one label for each row.*remove self-training"):
        SelfTraining().transform_data(make_run(text="text"), splits())


def test_log_likelihood_of_labels_is_cross_entropy() -> None:
    """The loss on rows with labels of their own is the task's plain one."""
    batch = whole()
    bench, plain = set_up([SelfTraining()], bert(0.0), batch), Plain(bert(0.0))
    terms = bench.step([batch])
    guess = plain.logits(batch.parts["unlabelled"], 0).argmax(-1)
    wanted = functional.cross_entropy(plain.logits(batch.parts["augmented"], 0), guess)
    torch.testing.assert_close(terms["self_training"], wanted.detach())
