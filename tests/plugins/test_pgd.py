"""PGD against a reference written from the paper, and its invariants."""

from __future__ import annotations

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
    unit,
)
from torch import Tensor

from hybridengine.seams import Batch, sequence_norms
from hybridengine.seams.trace import cost_of
from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.adversarial.pgd import PGD
from hybridengine_plugins.regularize.rdrop import RDrop


def reference(epsilon: float, step_size: float, steps: int, norm: str = "l2") -> Any:
    """Madry et al., equation of section 2.1, with the projection of each norm."""

    def project(delta: Tensor) -> Tensor:
        if norm == "linf":
            return delta.clamp(-epsilon, epsilon)
        size = delta.flatten(1).norm(dim=1).view(-1, 1, 1)
        return torch.where(size > epsilon, delta * epsilon / size, delta)

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        delta = plain.zeros(batch)
        for _ in range(steps):
            g = torch.autograd.grad(plain.loss(batch, seed, delta), delta)[0]
            direction = unit(g) if norm == "l2" else g.sign()
            delta = project(delta.detach() + step_size * direction).requires_grad_()
        return plain.gradient(plain.loss(batch, seed, delta.detach()))

    return gradient


@pytest.mark.parametrize(
    ("epsilon", "step_size", "steps", "norm"), [(1.0, 0.3, 3, "l2"), (0.5, 0.4, 3, "l2"), (0.03, 0.02, 2, "linf")]
)
def test_matches_the_paper(epsilon: float, step_size: float, steps: int, norm: Any) -> None:
    method = PGD(epsilon=epsilon, step_size=step_size, steps=steps, norm=norm)
    match(method, reference(epsilon, step_size, steps, norm))


def test_one_step_of_epsilon_is_fgm_on_the_adversarial_input_alone() -> None:
    batch = make_batch()
    pgd = gradients(lambda: [PGD(epsilon=0.7, step_size=0.7, steps=1)], [batch], bert())
    fgm = gradients(lambda: [FGM(epsilon=0.7, weight=1.0)], [batch], bert())
    assert apart(pgd, fgm) < EXACT


def test_epsilon_zero_is_plain_training() -> None:
    batch = make_batch()
    assert apart(gradients(lambda: [PGD(epsilon=0.0)], [batch], bert()), gradients(list, [batch], bert())) < EXACT


@settings(max_examples=10, deadline=None)
@given(
    epsilon=st.floats(1e-2, 3),
    share=st.floats(0.1, 2),
    steps=st.integers(1, 4),
    size=st.integers(1, 4),
    length=st.integers(4, 9),
)
def test_stays_in_the_ball(epsilon: float, share: float, steps: int, size: int, length: int) -> None:
    batch, spy = make_batch(size, length, seed=steps), Spy()
    set_up([PGD(epsilon=epsilon, step_size=share * epsilon, steps=steps)], bert(), batch, task=spy).step([batch])
    assert len(spy.deltas) == steps + 1
    for delta in spy.deltas:
        assert sequence_norms(delta).max() <= epsilon * (1 + 1e-9)
        assert not any(moved[batch.inputs["attention_mask"] == 0].any() for moved in delta.values())
    first = sequence_norms(spy.deltas[1])
    torch.testing.assert_close(first, torch.full((size,), min(share, 1) * epsilon, dtype=torch.float64))


def test_more_small_steps_never_lower_the_loss() -> None:
    batch, losses = make_batch(), []
    for steps in (1, 2, 4, 8):
        bench = set_up([PGD(epsilon=1.0, step_size=0.02, steps=steps)], bert(), batch)
        losses.append(float(bench.step([batch])["loss"]))
    assert losses == sorted(losses)


def test_cost_is_one_full_pass_and_delta_only_ascents() -> None:
    bench = set_up([PGD(steps=3)], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 G F4 G F4 G F4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 9
    assert bench.effect("pgd", "delta_norm") > 0
    assert bench.effect("pgd", "loss_gain") > 0


def test_ascents_run_on_the_task_alone_and_compute_no_weight_gradient() -> None:
    """R-Drop around the leaf does not double the ascents, and nothing reaches `.grad` before the training pass."""
    batch = make_batch()
    bench = set_up([PGD(steps=2), RDrop()], bert(), batch)
    bench.step([batch])
    assert bench.ctx.trace.text() == "F4 G F4 G F8 B S"
    ctx, seen = bench.ctx, []
    grad = ctx.grad
    ctx.grad = lambda *a, **k: (seen.append([p.grad for p in ctx.run.optimised().values()]), grad(*a, **k))[1]
    bench.step([batch])
    assert len(seen) == 2
    assert all(g is None for grads in seen for g in grads)


def test_invariants() -> None:
    check_accumulation(lambda: [PGD()])
    check_padding(lambda: [PGD()])
    check_loss_scale(lambda: [PGD()])
    check_restores(lambda: [PGD(steps=2)], forwards=3)
