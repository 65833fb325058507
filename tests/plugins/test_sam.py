"""SAM and ASAM against references written from the papers, a closed form, and exact restoration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import (
    EXACT,
    Plain,
    Spy,
    apart,
    bert,
    check_accumulation,
    check_loss_scale,
    check_padding,
    check_restores,
    gradients,
    match,
    rows_of,
)
from torch import Tensor, nn
from torch.nn import functional

from hybridengine.errors import NonFiniteError
from hybridengine.seams import Batch, Context, Out, View
from hybridengine.seams.precision import Precision
from hybridengine.seams.trace import cost_of
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.sam import ASAM, AWP, GSAM, SAM


def reference(rho: float, eta: float | None = None) -> Any:
    """Foret et al., equation 2 and algorithm 1; Kwon et al., equation 8 where eta is given."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        g = plain.gradient(plain.loss(batch, seed))
        t = {k: torch.ones_like(x) if eta is None else plain.parameters[k].abs() + eta for k, x in g.items()}
        norm = torch.cat([(t[k] * x).flatten() for k, x in g.items()]).norm()
        kept = {k: p.detach().clone() for k, p in plain.parameters.items()}
        with torch.no_grad():
            for k, x in g.items():
                plain.parameters[k] += rho * t[k] ** 2 * x / norm
        there = plain.gradient(plain.loss(batch, seed))
        with torch.no_grad():
            for k, value in kept.items():
                plain.parameters[k].copy_(value)
        return there

    return gradient


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_matches_the_paper(rho: float) -> None:
    match(SAM(rho=rho), reference(rho))


def of_kin(rho: float, alpha: float | None = None) -> Any:
    """Zhuang et al., algorithm 1, where alpha is given; else Wu et al., equations 8 and 9 with one ascent step."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        g = plain.gradient(plain.loss(batch, seed))
        whole = torch.cat([x.flatten() for x in g.values()]).norm()
        kept = {k: p.detach().clone() for k, p in plain.parameters.items()}
        with torch.no_grad():
            for k, x in g.items():
                plain.parameters[k] += rho * (x / whole if alpha is not None else kept[k].norm() * x / x.norm())
        there = plain.gradient(plain.loss(batch, seed))
        with torch.no_grad():
            for k, value in kept.items():
                plain.parameters[k].copy_(value)
        if alpha is None:
            return there
        here, near = (torch.cat([x[k].flatten() for k in g]) for x in (g, there))
        cosine = functional.cosine_similarity(here, near, dim=0)
        parallel = cosine * here.norm() * near / near.norm()
        total = near - alpha * (here - parallel)
        parts = total.split([x.numel() for x in g.values()])
        return {k: part.view_as(x) for (k, x), part in zip(g.items(), parts, strict=True)}

    return gradient


@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_gsam_matches_the_paper(alpha: float) -> None:
    match(GSAM(rho=0.3, alpha=alpha), of_kin(0.3, alpha))


def test_gsam_without_alpha_is_sam() -> None:
    batch = make_batch()
    one, other = (gradients(lambda m=m: [m], [batch], bert()) for m in (GSAM(rho=0.3, alpha=0.0), SAM(rho=0.3)))
    assert apart(one, other) == 0.0


@pytest.mark.parametrize("gamma", [0.005, 0.1])
def test_awp_matches_the_paper(gamma: float) -> None:
    match(AWP(rho=gamma), of_kin(gamma))


def test_awp_attacks_the_input_once() -> None:
    batch = make_batch()
    seen = {}
    for method in (AWP(rho=0.2), SAM(rho=0.2)):
        spy = Spy()
        set_up([method, FGM(epsilon=1.0)], bert(0.0), batch, task=spy).gradients([batch])
        (site,) = spy.deltas[1]
        seen[type(method)] = spy.deltas[1][site], spy.deltas[3][site]  # clean, attacked, at w and at w + v
    assert torch.equal(*seen[AWP]) and not torch.equal(*seen[SAM])


def test_awp_starts_when_told() -> None:
    assert [AWP(start=2).active(step) for step in range(4)] == [False, False, True, True]


def test_adaptive_matches_the_paper() -> None:
    match(ASAM(), reference(0.5, 0.01))
    match(ASAM(rho=0.5, eta=0.2), reference(0.5, 0.2))


class Quadratic(nn.Module):
    """Its output is its weights, so that a task can make any function of them the loss."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.weights)


class QuadraticTask(SimpleTask):
    """L(w) = w' A w / 2, per batch."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
        out = ctx.outputs(batch, [view])[0]
        return Out({"loss": (out.scores @ self.matrix @ out.scores / 2 * batch.size, "rows")}, out.logits, None, view)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rho=st.floats(0.01, 2), micro=st.integers(1, 3))
def test_closed_form_on_a_quadratic(seed: int, rho: float, micro: int) -> None:
    """With g = A w the gradient is A (w + rho g / ||g||)."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix, w = root @ root.T, torch.randn(5, generator=generator, dtype=torch.float64)
    batch = make_batch()
    bench = set_up([SAM(rho=rho)], Quadratic(w), batch, task=QuadraticTask(matrix))
    got = bench.gradients([batch] * micro)["weights"]
    g = matrix @ w
    torch.testing.assert_close(got, matrix @ (w + rho * g / g.norm()))
    assert bench.effect("sam", "perturbation_norm") == pytest.approx(rho, rel=1e-6)
    assert torch.equal(bench.parameters()["weights"], w)


def test_rho_zero_is_plain_training() -> None:
    batch = make_batch()
    assert apart(gradients(lambda: [SAM(rho=0.0)], [batch], bert()), gradients(list, [batch], bert())) < EXACT


def test_zero_gradient_perturbs_nothing() -> None:
    w = torch.zeros(3, dtype=torch.float64)
    bench = set_up([SAM()], Quadratic(w), make_batch(), task=QuadraticTask(torch.eye(3, dtype=torch.float64)))
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 B S"


def test_non_finite_gradient_perturbs_nothing_and_stops_before_the_update() -> None:
    w = torch.full((3,), float("inf"), dtype=torch.float64)
    bench = set_up([SAM()], Quadratic(w), make_batch(), task=QuadraticTask(torch.eye(3, dtype=torch.float64)))
    with pytest.raises(NonFiniteError):
        bench.step([make_batch()])
    assert "W" not in bench.ctx.trace.text()
    assert torch.equal(bench.parameters()["weights"], w)


def test_the_norm_spans_all_micro_batches() -> None:
    """The ascent uses the step's whole gradient, not one per micro-batch."""
    batch = make_batch(8, 9)
    whole = gradients(lambda: [SAM(rho=0.5)], [rows_of(batch, 0, 8)], bert(0.0))
    parts = [rows_of(batch, i, i + 2) for i in range(0, 8, 2)]
    assert apart(gradients(lambda: [SAM(rho=0.5)], parts, bert(0.0)), whole) < EXACT
    bench = set_up([SAM(rho=0.5)], bert(0.0), batch)
    bench.step(parts)
    assert bench.ctx.trace.text() == "F2 b F2 b F2 b F2 B W F2 b F2 b F2 b F2 B S"


def test_frozen_parameters_do_not_move() -> None:
    batch = make_batch()
    model = bert()
    model.bert.requires_grad_(False)
    frozen = model.bert.embeddings.word_embeddings.weight
    before, seen = frozen.detach().clone(), []
    bench = set_up([SAM(rho=1.0)], model, batch)
    model.register_forward_pre_hook(lambda *_: seen.append(frozen.detach().clone()))
    bench.step([batch])
    assert len(seen) == 2
    assert all(torch.equal(x, before) for x in seen)
    assert bench.effect("sam", "perturbation_norm") == pytest.approx(1.0)


def test_it_really_moves_under_an_outer_autocast() -> None:
    """A caller's autocast keeps a cast cache alive, in which moved weights would be read in their old cast."""
    batch, losses = make_batch(), []

    class Watch(SimpleTask):
        def loss(self, ctx: Context, batch: Batch, view: View) -> Out:
            out = super().loss(ctx, batch, view)
            losses.append(float(out.terms["loss"][0].detach()))
            return out

    bf16 = Precision("bf16", torch.bfloat16)
    for outer in (False, True):
        bench = set_up([SAM(rho=0.5)], tiny_bert(num_labels=3), batch, precision=bf16, task=Watch())
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            bench.step([batch])
    plain, moved, plain_outer, moved_outer = losses
    assert moved > plain * 1.1
    assert (plain_outer, moved_outer) == (plain, moved)


def test_reports_the_loss_at_the_weights_and_the_gain() -> None:
    batch = make_batch()
    clean = float(set_up([], bert(0.0), batch).step([batch])["loss"])
    bench = set_up([SAM(rho=0.3)], bert(0.0), batch)
    assert float(bench.step([batch])["loss"]) == pytest.approx(clean)
    assert bench.effect("sam", "loss_gain") > 0


def test_cost() -> None:
    bench = set_up([SAM()], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 B W F4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 6
    bench = set_up([SAM(), FGM()], bert(), make_batch())
    bench.step([make_batch()])
    assert cost_of(bench.ctx.trace.events, 4) == 12


def test_invariants() -> None:
    for stack in (
        lambda: [SAM(rho=0.3)],
        lambda: [ASAM(rho=0.3)],
        lambda: [AWP(rho=0.1)],
        lambda: [GSAM(rho=0.3, alpha=0.3)],
    ):
        check_accumulation(stack)
        check_padding(stack)
        check_loss_scale(stack)
    check_restores(lambda: [SAM(rho=0.3)], forwards=2)
