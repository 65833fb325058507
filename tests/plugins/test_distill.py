"""Distillation against a reference written from the paper, and what the teacher must not do."""

from __future__ import annotations

from collections.abc import Sequence
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
    gradients,
    key,
    kl,
    match,
)
from torch import Tensor

from hybridengine.errors import ModelError
from hybridengine.plugin import Run, Split
from hybridengine.seams import Batch, Row, mix
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


def test_unlabelled_rows_are_learned_from(alpha: float = 0.7, temperature: float = 2.0) -> None:
    """The same divergence, averaged over all rows; cross-entropy over the labelled ones."""
    fixed = Plain(teacher())
    fixed.model.eval()

    def with_part(seed: int) -> Batch:
        part = make_batch(6, seed=seed + 50, first_row=100)
        whole = make_batch(seed=seed, parts={"unlabelled": part})
        return replace(whole, counts={**whole.counts, "all_rows": 10})

    bench = set_up([Distill("teacher", alpha, temperature)], bert(), with_part(0), lr=LR, prepare=taught_by())
    plain = Plain(bert())
    for step in range(3):
        batch = with_part(step)
        bench.step([batch])
        student = plain.logits(batch, key(step))
        other = plain.logits(batch.parts["unlabelled"], mix(key(step), "unlabelled"))
        with torch.no_grad():
            soft = fixed.logits(batch, 0), fixed.logits(batch.parts["unlabelled"], 0)
        pairs = zip(soft, (student, other), strict=True)
        total = sum(len(p) * kl(p / temperature, q / temperature) for p, q in pairs)
        ce = torch.nn.functional.cross_entropy(student, batch.targets)
        plain.descend(plain.gradient((1 - alpha) * ce + alpha * temperature**2 * total / 10))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT, step
    assert bench.ctx.trace.text() == "F4 f4 F6 f6 B S"


def test_a_finished_run_is_asked_once_for_each_row() -> None:
    """Where it writes rows in its own way, it answers for rows, not for this run's inputs."""
    asked: list[str] = []
    told = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]]).double().log()

    def answer(rows: Sequence[Row]) -> Tensor:
        asked.extend(row["text"] for row in rows)
        return told[[int(row["text"]) for row in rows]]

    def prepare(run: Run) -> None:
        run.splits = {"train": Split("train", [{"text": str(i)} for i in range(4)])}
        run.load_answers = lambda name: answer

    batch = make_batch()
    with torch.no_grad():
        expected = 4 * kl(told / 2, Plain(bert(0.0)).logits(batch, 0) / 2)
    for others in ([], [SAM(), FreeLB()]):
        asked.clear()
        bench = set_up([Distill("run", alpha=1.0), *others], bert(0.0), batch, prepare=prepare)
        terms = [bench.step([batch]), bench.step([batch])]
        assert asked == ["0", "1", "2", "3"] and "teacher" not in bench.run.modules
        if not others:
            torch.testing.assert_close(terms[1]["distill"], expected, rtol=EXACT, atol=EXACT)


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
