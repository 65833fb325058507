"""Label smoothing against its definition, and that the plain loss is not computed beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import EXACT, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, match
from torch import Tensor
from torch.nn import functional

from hybridengine.seams import Batch, Context, Out, Term, View
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.pgd import PGD
from hybridengine_plugins.regularize.label_smoothing import LabelSmoothing


def reference(smoothing: float) -> Any:
    """Szegedy et al., section 7: cross-entropy to (1 - s) on the label plus s / C everywhere."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        log_p = plain.logits(batch, seed).log_softmax(-1)
        target = (1 - smoothing) * functional.one_hot(batch.targets, 3).double() + smoothing / 3
        return plain.gradient(-(target * log_p).sum(-1).mean())

    return gradient


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_matches_the_paper(smoothing: float) -> None:
    match(LabelSmoothing(smoothing=smoothing), reference(smoothing))


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_zero_is_plain_training(kind: str) -> None:
    batch, task = make_batch(kind=kind), SimpleTask(kind)

    def model() -> Any:
        return bert() if kind == "rows" else tiny_bert("AutoModelForTokenClassification", num_labels=3).double()

    smoothed = gradients(lambda: [LabelSmoothing(smoothing=0.0)], [batch], model(), task=task)
    assert apart(smoothed, gradients(list, [batch], model(), task=task)) < EXACT


class Counting(SimpleTask):
    """Counts evaluations of the leaf loss, by their smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        raise AssertionError("the task's own loss must not run")

    def terms(self, logits: Tensor, batch: Batch, **options: Any) -> dict[str, Term]:
        self.seen.append(options.get("label_smoothing", 0.0))
        return super().terms(logits, batch, **options)


def test_the_plain_loss_is_computed_only_to_measure_the_effect() -> None:
    task, batch = Counting(), make_batch()
    bench = set_up([LabelSmoothing()], bert(), batch, task=task)
    for _ in range(11):
        bench.step([batch])
    assert task.seen.count(0.1) == 11
    assert task.seen.count(0.0) == 2
    assert bench.ctx.trace.text() == "F4 B S"


def test_ascents_see_the_smoothed_loss() -> None:
    """It is the leaf, so `task_loss` includes it."""
    task, batch = Counting(), make_batch()
    bench = set_up([LabelSmoothing(), PGD(steps=2)], bert(), batch, task=task)
    bench.run.step = 1
    bench.step([batch])
    assert task.seen == [0.1] * 3


def test_effect_is_the_change_of_the_loss() -> None:
    batch = make_batch()
    bench = set_up([LabelSmoothing(smoothing=0.3)], bert(0.0), batch)
    bench.step([batch])
    with torch.no_grad():
        logits = Plain(bert(0.0)).logits(batch, 0)
    change = functional.cross_entropy(logits, batch.targets, label_smoothing=0.3)
    change = abs(change - functional.cross_entropy(logits, batch.targets))
    assert bench.effect("label-smoothing", "loss_change") == pytest.approx(float(change), rel=1e-6)


def test_invariants() -> None:
    check_accumulation(lambda: [LabelSmoothing()])
    check_padding(lambda: [LabelSmoothing()])
    check_loss_scale(lambda: [LabelSmoothing()])
