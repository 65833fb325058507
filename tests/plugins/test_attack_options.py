"""The options that attacks share, `start`, `ramp`, `per` and `targeted`, against plain torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from plain import (
    EXACT,
    Plain,
    Spy,
    apart,
    bert,
    check_accumulation,
    check_loss_scale,
    check_padding,
    key,
    match,
)
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import StackError
from hybridengine.plugin import Attack, StackView, TargetedAttack, hook, parameter
from hybridengine.plugin.parameters import parameter_rows
from hybridengine.seams import Batch, KeyedRows, View, sequence_norms
from hybridengine.seams.trace import cost_of
from hybridengine.stack import as_method
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.fgm import FGM, FGSM
from hybridengine_plugins.adversarial.freeat import FreeAT
from hybridengine_plugins.adversarial.freelb import FreeLB
from hybridengine_plugins.adversarial.pgd import PGD
from hybridengine_plugins.adversarial.smart import ALUM, SMART
from hybridengine_plugins.adversarial.tavat import TAVAT
from hybridengine_plugins.adversarial.vat import VAT

SITE = "bert.embeddings.word_embeddings"
ATTACKS = (FGM, FGSM, PGD, FreeLB, FreeAT, TAVAT, VAT, ALUM, SMART)
TARGETED = {"fgm": FGM(epsilon=0.5, weight=0.6), "fgsm": FGSM(epsilon=0.02), "pgd": PGD(epsilon=0.5, step_size=0.3)}


# ---- one block of options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ATTACKS, ids=lambda cls: cls.__name__)
def test_every_attack_has_the_options_and_lists_its_own_first(cls: type) -> None:
    names = [row["name"] for row in parameter_rows(cls)]
    shared = [item.name for item in fields(TargetedAttack) if item.name in names]
    assert names[-len(shared) :] == shared
    assert {"start", "ramp"} <= set(shared)
    assert ("targeted" in shared) == (cls in (FGM, FGSM, PGD))
    assert ("per" in shared) == (cls not in (TAVAT, ALUM, SMART))


# ---- ramp ----------------------------------------------------------------------------------------------------------


def test_sizes_grow_in_a_line_after_the_start() -> None:
    batch, spy = make_batch(), Spy()
    bench = set_up([FGM(epsilon=0.8, weight=1.0, start=2, ramp=4)], bert(), batch, task=spy)
    norms = []
    for _ in range(8):
        spy.deltas.clear()
        bench.step([batch])
        norms.append(float(sequence_norms(spy.deltas[-1]).max()) if spy.deltas[-1] else 0.0)
    assert norms == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@pytest.mark.parametrize(
    "ramped",
    [
        FGM(epsilon=0.5),
        FGSM(epsilon=0.02),
        PGD(epsilon=0.2, step_size=0.15),
        PGD(epsilon=0.2, step_size=0.15, targeted="random"),
        FreeLB(epsilon=0.15, init=0.3),
        FreeAT(step_size=0.2),
        TAVAT(),
        VAT(epsilon=0.4),
        ALUM(epsilon=0.05, step_size=0.04, sigma=0.04),
        SMART(epsilon=0.05, step_size=0.04),
    ],
    ids=lambda method: type(method).__name__,
)
def test_half_way_up_the_ramp_every_size_is_half(ramped: Any) -> None:
    """But not the probes that measure a direction: xi, sigma, and the words' table, which is cut to the ball."""
    batch, sizes = make_batch(), {"epsilon", "step_size", "init"} - ({"init"} if isinstance(ramped, TAVAT) else set())
    half = {name: value / 2 for name in sizes if (value := getattr(ramped, name, None)) is not None}
    one, other = (
        set_up([method], bert(), batch).gradients([batch])
        for method in (replace(ramped, ramp=2), replace(ramped, **half))
    )
    assert apart(one, other) < EXACT
    assert apart(one, set_up([ramped], bert(), batch).gradients([batch])) > 1e-6


# ---- per token -----------------------------------------------------------------------------------------------------


def token_unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=2, keepdim=True).clamp_min(1e-300)


def per_token(steps: int, step_size: float, epsilon: float) -> Any:
    """Madry et al. with a ball around every token."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        delta = plain.zeros(batch)
        for _ in range(steps):
            delta = delta.detach().requires_grad_()
            delta = delta + step_size * token_unit(torch.autograd.grad(plain.loss(batch, seed, delta), delta)[0])
            delta = delta * (epsilon / delta.norm(dim=2, keepdim=True).clamp_min(epsilon))
        return plain.gradient(plain.loss(batch, seed, delta.detach()))

    return gradient


def test_a_ball_around_every_token_matches_the_formula() -> None:
    match(PGD(epsilon=0.3, step_size=0.2, per="token"), per_token(3, 0.2, 0.3))
    match(FGM(epsilon=0.2, weight=1.0, per="token"), per_token(1, 0.2, 0.2))


@pytest.mark.parametrize("method", [FGM, PGD, FreeLB, FreeAT, VAT], ids=lambda cls: cls.__name__)
def test_every_token_moves_by_its_own_size(method: Any) -> None:
    batch, watched = make_batch(), list[Tensor]()
    options: dict[str, Any] = {"epsilon": 0.3, "per": "token"} | ({} if method in (FGM, VAT) else {"step_size": 0.5})
    if method is FreeLB:
        options["init"] = 5.0
    bench = set_up([method(**options)], bert(0.0), batch)
    outputs = bench.ctx.outputs

    def watch(batch: Batch, views: Any, **more: Any) -> Any:
        watched.extend(view.delta[SITE].detach() for view in views if view.delta)
        return outputs(batch, views, **more)

    bench.ctx.outputs = watch  # type: ignore[method-assign]
    bench.step([batch])
    real = batch.inputs["attention_mask"] != 0
    norms = watched[-1].norm(dim=2)
    torch.testing.assert_close(norms[real], torch.full_like(norms[real], 0.3))
    assert not norms[~real].any()
    if method is FreeLB:  # the start: every coordinate within init / sqrt(D)
        assert 0.5 < float(watched[0].abs().max()) * 32**0.5 / 5.0 <= 1


# ---- targeted ------------------------------------------------------------------------------------------------------


def target(choice: str, logits: Tensor, batch: Batch, step: int) -> Tensor:
    """Another class for each row, by plain loops."""
    draws, classes = KeyedRows((0, "targeted", step), batch.rows).uniform(), logits.shape[1]
    found = []
    for row, label in enumerate(batch.targets.tolist()):
        others = [(label + 1 + i) % classes for i in range(classes - 1)]
        likely = [float(logits[row, c]) for c in others]
        found.append(
            others[int(float(draws[row]) * (classes - 1)) if choice == "random" else likely.index(min(likely))]
        )
    return torch.tensor(found)


def towards(choice: str, method: Any) -> Any:
    """Kurakin et al. 2017, section 2: descend the cross-entropy of another class; then train as the method does."""
    step = iter(range(100))

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        aim = target(choice, plain.logits(batch, seed).detach(), batch, next(step))
        delta, length = plain.zeros(batch), getattr(method, "step_size", method.epsilon)
        for _ in range(getattr(method, "steps", 1)):
            delta = delta.detach().requires_grad_()
            loss = functional.cross_entropy(plain.logits(batch, seed, delta), aim)
            g = torch.autograd.grad(loss, delta)[0]
            unit = g.sign() if isinstance(method, FGSM) else g / g.flatten(1).norm(dim=1).view(-1, 1, 1)
            delta = delta - length * unit
            if isinstance(method, PGD):
                size = delta.flatten(1).norm(dim=1).view(-1, 1, 1)
                delta = torch.where(size > method.epsilon, delta * method.epsilon / size, delta)
        weight = getattr(method, "weight", 1.0)
        moved = plain.loss(batch, seed, delta.detach())
        return plain.gradient((1 - weight) * plain.loss(batch, seed) + weight * moved)

    return gradient


@pytest.mark.parametrize("choice", ["least-likely", "random"])
@pytest.mark.parametrize("name", TARGETED)
def test_targeted_steps_are_those_of_the_formula(name: str, choice: Any) -> None:
    match(replace(TARGETED[name], targeted=choice), towards(choice, TARGETED[name]))


class Aimed(SimpleTask):
    """Keeps the targets that losses were taken for."""

    def __init__(self, unit: str = "rows") -> None:
        super().__init__(unit)
        self.targets: list[Tensor] = []

    def terms(self, logits: Tensor, batch: Batch, **options: Any) -> Any:
        self.targets.append(batch.targets)
        return super().terms(logits, batch, **options)


@pytest.mark.parametrize("choice", ["least-likely", "random"])
@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_one_target_stays_through_an_attack_and_what_counts_nowhere_has_none(choice: Any, kind: str) -> None:
    head = "AutoModelForTokenClassification" if kind == "tokens" else "AutoModelForSequenceClassification"
    task, batch = Aimed(kind), make_batch(16, kind=kind)
    set_up([PGD(targeted=choice)], tiny_bert(head, num_labels=3), batch, task=task).step([batch])
    aims = [targets for targets in task.targets if targets is not batch.targets]
    assert len(aims) == 3 and aims[0] is aims[1] is aims[2]
    counted = batch.targets >= 0
    assert torch.equal(aims[0] < 0, ~counted)
    assert (aims[0] != batch.targets)[counted].all() and aims[0].max() < 3
    if choice == "random":
        assert len((aims[0] - batch.targets)[counted].remainder(3).unique()) == 2


def test_targets_are_never_the_label_and_their_own_rows() -> None:
    """Keyed by row and step: the same whatever stands beside it, others at the next step."""
    found = []
    for rows in (make_batch(16), make_batch(16, first_row=8)):
        task = Aimed()
        bench = set_up([PGD(targeted="random", steps=1)], bert(0.0), rows, task=task)
        bench.step([rows]), bench.step([rows])
        first, second = (targets for targets in task.targets if targets is not rows.targets)
        assert (first != rows.targets).all() and not torch.equal(first, second)
        found.append((first - rows.targets).remainder(3))
    assert torch.equal(found[0][8:], found[1][:8])


def test_a_targeted_attack_brings_the_other_class_nearer() -> None:
    batch = make_batch()
    plain, spy = Plain(bert(0.0)), Spy()
    logits = plain.logits(batch, key(0)).detach()
    aim = target("least-likely", logits, batch, 0)
    bench = set_up([PGD(epsilon=1.0, step_size=0.5, targeted="least-likely")], bert(0.0), batch, task=spy)
    bench.step([batch])
    moved = plain.logits(batch, key(0), spy.deltas[-1][SITE]).detach()
    before, after = (functional.cross_entropy(x, aim, reduction="none") for x in (logits, moved))
    assert (after < before).all()
    assert bench.effect("pgd", "loss_gain") > 0


def test_targeted_cost() -> None:
    for method, text, cost in (
        (FGM(targeted="random"), "F4 G F4 b F4 B S", 8),
        (FGM(targeted="least-likely", weight=1.0), "F4 G F4 B S", 5),
        (PGD(targeted="random"), "F4 G F4 G F4 G F4 B S", 9),
    ):
        bench = set_up([method], bert(), make_batch())
        bench.step([make_batch()])
        assert bench.ctx.trace.text() == text
        assert cost_of(bench.ctx.trace.events, 4) == cost


def test_without_classes_it_is_refused() -> None:
    method = as_method(PGD(targeted="random"))
    (problem,) = method.plugin.check_stack(StackView([method], {"labels": []}))
    assert "pgd: `targeted` needs a task with two classes" in problem and "remove `targeted`" in problem
    assert method.plugin.check_stack(StackView([method], {"labels": ["a", "b"]})) == []
    untargeted = as_method(PGD())
    assert untargeted.plugin.check_stack(StackView([untargeted], {"labels": []})) == []


def test_several_labels_a_row_are_refused() -> None:
    class Many(SimpleTask):
        def terms(self, logits: Tensor, batch: Batch, **options: Any) -> Any:
            loss = functional.binary_cross_entropy_with_logits(logits, batch.targets.to(logits), reduction="sum")
            return {"loss": (loss, "rows")}

    batch = make_batch()
    batch = replace(batch, targets=functional.one_hot(batch.targets, 3))
    bench = set_up([FGM(targeted="random")], bert(), batch, task=Many())
    with pytest.raises(StackError, match=r"one class for each row or token.*remove `targeted`"):
        bench.step([batch])


def test_invariants() -> None:
    for method in (
        PGD(epsilon=0.3, per="token", ramp=3),
        PGD(epsilon=0.3, targeted="random"),
        FGM(epsilon=0.3, targeted="least-likely"),
        FreeLB(per="token", init=0.5),
        VAT(per="token", epsilon=0.2, xi=0.2),
    ):

        def stack(method: Any = method) -> list[Any]:
            return [replace(method)]

        check_accumulation(stack)
        check_padding(stack)
        check_loss_scale(stack)


# ---- for other authors ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Mine(Attack):
    """Moves every coordinate the same way."""

    size: float = parameter(0.5, "how far", ge=0)

    @hook
    def wrap_loss(self, inner: Any, ctx: Any, batch: Batch, view: View) -> Any:
        zero = ctx.zeros(batch)
        delta = self.ascend(ctx, batch, zero, [torch.ones_like(z) for z in zero.values()], step_size=self.size)
        return inner(ctx, batch, view.plus(delta))


def test_an_attack_of_ones_own_takes_the_options() -> None:
    batch, spy = make_batch(), Spy()
    bench = set_up([Mine(start=1, ramp=2)], bert(), batch, task=spy)
    for _ in range(3):
        bench.step([batch])
    assert not spy.deltas[0]
    norms = [float(sequence_norms(delta).max()) for delta in spy.deltas[1:]]
    assert norms == pytest.approx([0.25, 0.5])
