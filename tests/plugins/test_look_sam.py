"""LookSAM against a reference written from the paper, its invariants, and its steps in the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
    match,
    padded,
    rows_of,
)
from torch import Tensor

from hybridengine.plugin import Traits
from hybridengine.seams import Batch
from hybridengine.seams.trace import cost_of
from hybridengine.stack import as_method, make_plan
from hybridengine.testing import make_batch, set_up, tiny_config
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.look_sam import LookSAM
from hybridengine_plugins.adversarial.sam import SAM


def reference(every: int, rho: float, alpha: float) -> Any:
    """Liu et al., algorithm 1, on the whole gradient as one vector."""
    kept: list[Tensor] = []
    count = iter(range(100))

    def flat(gradient: dict[str, Tensor]) -> Tensor:
        return torch.cat([g.flatten() for g in gradient.values()])

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        first = plain.gradient(plain.loss(batch, seed))
        g = flat(first)
        if next(count) % every == 0:
            before = {k: p.detach().clone() for k, p in plain.parameters.items()}
            plain.descend({k: x / g.norm() for k, x in first.items()}, lr=-rho)
            s = flat(plain.gradient(plain.loss(batch, seed)))
            for k, value in before.items():
                plain.parameters[k].data.copy_(value)
            cosine = torch.nn.functional.cosine_similarity(g, s, dim=0)
            kept[:] = [s - s.norm() * cosine * g / g.norm()]
            g = s
        else:
            g = g + alpha * g.norm() / kept[0].norm() * kept[0]
        parts = g.split([x.numel() for x in first.values()])
        return {k: part.view_as(x) for (k, x), part in zip(first.items(), parts, strict=True)}

    return gradient


@pytest.mark.parametrize(("every", "rho", "alpha"), [(2, 0.05, 0.7), (3, 0.3, 0.4), (5, 0.5, 1.0)])
def test_matches_the_paper(every: int, rho: float, alpha: float) -> None:
    # The quotient ||g|| / ||g_v|| magnifies the rounding of g_v, here by some 100 at rho 0.05; EXACT leaves that room.
    match(LookSAM(every=every, rho=rho, alpha=alpha), reference(every, rho, alpha), steps=7)


def trained(method: Any, batches: list[list[Batch]], model: Any = None, **options: Any) -> dict[str, Tensor]:
    bench = set_up([method] if method else [], model or bert(0.0), batches[0][0], lr=LR, **options)
    for works in batches:
        bench.step(works)
    return bench.parameters()


def test_at_every_step_it_is_sam() -> None:
    batches = [[make_batch(seed=s)] for s in range(3)]
    assert apart(trained(LookSAM(every=1, rho=0.3), batches), trained(SAM(rho=0.3), batches)) < EXACT


def test_without_alpha_the_steps_between_are_plain() -> None:
    first, second = [make_batch(seed=0)], [make_batch(seed=1)]
    bench = set_up([SAM(rho=0.3)], bert(0.0), first[0], lr=LR)
    bench.step(first)
    plain = set_up([], bench.run.model, first[0], lr=LR)
    plain.run.step = 1
    plain.step(second)
    assert apart(trained(LookSAM(every=2, rho=0.3, alpha=0.0), [first, second]), plain.parameters()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rho_zero_is_plain_training_and_rounding_is_not_magnified(dtype: torch.dtype) -> None:
    """What is left of g_s - g is rounding; scaled to the size of g it would be a random push."""
    batches = [[make_batch(seed=s)] for s in range(4)]
    found = trained(LookSAM(rho=0.0), batches, bert().to(dtype))
    assert apart(found, trained(None, batches, bert().to(dtype))) < (EXACT if dtype == torch.float64 else 1e-6)
    smallest = torch.finfo(dtype).eps / 10
    tiny = set_up([LookSAM(rho=smallest)], bert().to(dtype), batches[0][0], lr=LR)
    tiny.step(batches[0])
    assert not tiny.run.state("look-sam")


def test_the_kept_direction_is_a_unit_vector_at_right_angles_in_run_state() -> None:
    batch = make_batch()
    bench, plain = set_up([LookSAM(rho=0.3)], bert(0.0), batch), Plain(bert(0.0))
    bench.step([batch])
    g = plain.gradient(plain.loss(batch, 0))
    kept = bench.run.state("look-sam")
    assert sum(float(v.square().sum()) for v in kept.values()) == pytest.approx(1)
    assert sum(float((kept[k] * x).sum()) for k, x in g.items()) == pytest.approx(0, abs=1e-12)
    assert 0 < bench.effect("look-sam", "orthogonal_share") < 1
    assert bench.effect("look-sam", "perturbation_norm") == pytest.approx(0.3)


def test_weights_that_rest_take_no_push_and_new_ones_join_at_the_next_look() -> None:
    batch = make_batch()
    bench = set_up([LookSAM(every=2, rho=0.3)], bert(), batch, lr=LR)
    weight = bench.run.model.classifier.weight.requires_grad_(False)
    bench.step([batch])
    assert "classifier.weight" not in bench.run.state("look-sam")
    weight.requires_grad_(True)
    bench.step([batch]), bench.step([batch])
    assert "classifier.weight" in bench.run.state("look-sam")


def test_splits_padding_and_scale_change_no_step_between() -> None:
    whole = rows_of(make_batch(8, 9, seed=1), 0, 8)
    methods = [LookSAM(every=2, rho=0.3) for _ in range(5)]
    one = trained(methods[0], [[whole]] * 2)
    for method, size in zip(methods[1:3], (2, 1), strict=True):
        parts = [rows_of(whole, i, i + size) for i in range(0, 8, size)]
        assert apart(trained(method, [parts] * 2), one) < EXACT
    assert apart(trained(methods[3], [[padded(whole, 4)]] * 2), one) < EXACT
    assert apart(trained(methods[4], [[whole]] * 2, loss_scale=1024.0), one) < EXACT


def test_invariants() -> None:
    def stack() -> list[Any]:
        return [LookSAM(rho=0.3)]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=2)


def test_cost() -> None:
    bench = set_up([LookSAM(every=3)], bert(), make_batch())
    found = []
    for _ in range(4):
        bench.step([make_batch()])
        found.append((bench.ctx.trace.text(), cost_of(bench.ctx.trace.events, 4)))
    assert found == [("F4 B W F4 B S", 6), ("F4 B S", 3), ("F4 B S", 3), ("F4 B W F4 B S", 6)]


# ---- steps that take turns, in the plan ------------------------------------------------------------------------------


def test_the_plan_shows_one_phase_with_the_mean_cost_of_a_period() -> None:
    (phase,) = make_plan(tiny_config(batch_size=4), [as_method(LookSAM(every=5))], 1000).phases
    assert phase.passes == "F4 B W (F4 B S) x5"
    assert phase.relative_cost == pytest.approx(6 / 5)
    assert phase.sync_points == 2
    assert [turn["F"] for turn in phase.turns] == [2, 1, 1, 1, 1]
    assert [phase.counts_at(step)["F"] for step in (0, 4, 5, 999)] == [2, 1, 2, 1]
    assert phase.counts["F"] == 6


def test_phases_of_other_methods_may_start_within_a_period() -> None:
    methods = [as_method(LookSAM(every=3)), as_method(FGM(epsilon=0.1, start=4))]
    before, after = make_plan(tiny_config(batch_size=4), methods, 100).phases
    assert (before.start, after.start) == (0, 4)
    assert [after.counts_at(step)["F"] for step in (4, 5, 6, 7)] == [2, 2, 4, 2]
    assert after.relative_cost == pytest.approx((6 + 6 + 12) / 9, abs=1e-3)


def test_a_short_run_plans_no_more_steps_than_it_makes() -> None:
    (phase,) = make_plan(tiny_config(batch_size=4), [as_method(LookSAM(every=20))], 3).phases
    assert len(phase.turns) == 3


@dataclass(eq=False)
class Alternating:
    """Does nothing, every other step."""

    traits: ClassVar[Traits] = Traits()
    period: ClassVar[int] = 2


def test_periods_of_several_methods_are_joined() -> None:
    methods = [as_method(LookSAM(every=3)), as_method(Alternating())]
    (phase,) = make_plan(tiny_config(batch_size=4), methods, 100).phases
    assert len(phase.turns) == 6
    assert phase.relative_cost == pytest.approx(4 / 3, abs=1e-3)
