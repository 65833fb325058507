"""Distillation against a reference written from the paper, and what the teacher must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import (
    EXACT,
    Plain,
    apart,
    bert,
    check_accumulation,
    check_loss_scale,
    check_padding,
    gradients,
    kl,
    match,
)
from torch import Tensor

from hybridengine.errors import ModelError
from hybridengine.plugin import Run
from hybridengine.seams import Batch
from hybridengine.seams.trace import cost_of
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.freelb import FreeLB
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.regularize.distill import Distill


def teacher(**config: Any) -> Any:
    return bert(0.5, seed=7, hidden_size=16, **config).train()  # dropout, so that forgetting eval mode would show


def taught_by(model: Any = None) -> Any:
    def prepare(run: Run) -> None:
        run.load_model = lambda name: teacher() if model is None else model

    return prepare


def reference(alpha: float, temperature: float) -> Any:
    """Hinton et al., section 2: soft targets at temperature T, their gradient scaled by T squared."""
    fixed = Plain(teacher())
    fixed.model.eval()

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        student = plain.logits(batch, seed)
        with torch.no_grad():
            soft = fixed.logits(batch, 0)
        ce = torch.nn.functional.cross_entropy(student, batch.targets)
        return plain.gradient((1 - alpha) * ce + alpha * temperature**2 * kl(soft / temperature, student / temperature))

    return gradient


@pytest.mark.parametrize(("alpha", "temperature"), [(0.5, 2.0), (0.9, 4.0), (1.0, 1.0)])
def test_matches_the_paper(alpha: float, temperature: float) -> None:
    method = Distill("teacher", alpha=alpha, temperature=temperature)
    match(method, reference(alpha, temperature), prepare=taught_by())


def test_alpha_zero_is_plain_training() -> None:
    batch = make_batch()
    distilled = gradients(lambda: [Distill("teacher", alpha=0.0)], [batch], bert(), prepare=taught_by())
    assert apart(distilled, gradients(list, [batch], bert())) < EXACT


def test_a_copy_of_the_student_teaches_nothing() -> None:
    batch = make_batch()
    bench = set_up([Distill("teacher")], bert(0.0), batch, prepare=taught_by(bert(0.0)))
    bench.step([batch])
    assert bench.effect("distill", "kl") == 0


def test_the_teacher_stays_as_it_is() -> None:
    batch = make_batch()
    bench = set_up([Distill("teacher")], bert(), batch, lr=0.2, prepare=taught_by())
    before = {k: p.clone() for k, p in bench.run.modules["teacher"].state_dict().items()}
    for _ in range(2):
        bench.step([batch])
    module = bench.run.modules["teacher"]
    assert not module.training
    assert all(torch.equal(p, before[k]) for k, p in module.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    assert not any(name.startswith("teacher/") for name in bench.run.may_optimise)
    assert bench.effect("distill", "kl") > 0


def test_the_teacher_runs_once_per_batch_and_sees_clean_inputs() -> None:
    batch, seen = make_batch(), []
    model = teacher()
    model.classifier.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    bench = set_up([Distill("teacher"), FreeLB(steps=3), SAM()], bert(), batch, prepare=taught_by(model))
    seen.clear()
    bench.step([batch])
    assert bench.ctx.trace.text() == "F4 f4 b F4 b F4 B W F4 b F4 b F4 B S"
    with torch.no_grad():
        assert torch.equal(seen[0], model(**batch.inputs).logits)
    bench.step([make_batch(seed=1)])
    assert len(seen) == 3  # ours, and one for each step


def test_cost() -> None:
    bench = set_up([Distill("teacher")], bert(), make_batch(), prepare=taught_by())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 f4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 4


def test_a_teacher_of_other_classes_is_refused() -> None:
    other = tiny_bert(num_labels=5).double()
    bench = set_up([Distill("wide")], bert(), make_batch(), prepare=taught_by(other))
    with pytest.raises(ModelError, match=r"teacher wide gives scores of shape \(4, 5\), the student \(4, 3\)"):
        bench.step([make_batch()])


def test_invariants() -> None:
    for check in (check_accumulation, check_padding, check_loss_scale):
        check(lambda: [Distill("teacher")], prepare=taught_by())
