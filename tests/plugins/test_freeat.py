"""FreeAT against a reference written from the paper, and its invariants."""

from __future__ import annotations

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
    key,
    padded,
    rows_of,
    unit,
)
from torch import Tensor

from hybridengine.seams import sequence_norms
from hybridengine.seams.trace import cost_of
from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.adversarial.freeat import FreeAT
from hybridengine_plugins.adversarial.freelb import FreeLB
from hybridengine_plugins.regularize.ema import EMA

SITE = "bert.embeddings.word_embeddings"


def reference(plain: Plain, step: int, steps: int, step_size: float, epsilon: float | None, norm: str) -> None:
    """Shafahi et al., algorithm 1, with the norms of Zhu et al.: descent and ascent from one backward."""
    batch = make_batch(seed=step)
    delta = plain.zeros(batch)
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        loss = plain.loss(batch, key(step), delta)
        g = torch.autograd.grad(loss, delta, retain_graph=True)[0]
        plain.descend(plain.gradient(loss))
        delta = delta + step_size * (unit(g) if norm == "l2" else g.sign())
        if epsilon is not None and norm == "l2":
            size = delta.flatten(1).norm(dim=1).view(-1, 1, 1)
            delta = torch.where(size > epsilon, delta * epsilon / size, delta)
        elif epsilon is not None:
            delta = delta.clamp(-epsilon, epsilon)


@pytest.mark.parametrize(
    ("steps", "step_size", "epsilon", "norm"),
    [(3, 0.1, None, "l2"), (2, 0.5, 0.3, "l2"), (4, 0.3, 0.5, "l2"), (3, 0.02, 0.03, "linf")],
)
def test_matches_the_paper(steps: int, step_size: float, epsilon: float | None, norm: Any) -> None:
    method = FreeAT(steps=steps, step_size=step_size, epsilon=epsilon, norm=norm)
    bench, plain = set_up([method], bert(), make_batch(), lr=LR), Plain(bert())
    for step in range(3):
        bench.step([make_batch(seed=step)])
        reference(plain, step, steps, step_size, epsilon, norm)
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT, step


def test_one_replay_is_plain_training_and_epsilon_zero_repeats_it() -> None:
    batch = make_batch()
    plain, once, twice = (set_up(m, bert(), batch, lr=LR) for m in ([], [FreeAT(steps=1)], [FreeAT(2, epsilon=0.0)]))
    plain.step([batch]), once.step([batch]), twice.step([batch])
    assert apart(once.parameters(), plain.parameters()) == 0.0
    plain.run.step = 0  # the second replay has the dropout masks of the first
    plain.step([batch])
    assert apart(twice.parameters(), plain.parameters()) < EXACT


def test_weights_move_between_replays_and_masks_stay() -> None:
    batch, spy, seen = make_batch(), Spy(), list[Tensor]()
    bench = set_up([FreeAT(steps=3)], bert(), batch, task=spy, lr=LR)
    weight = bench.run.model.bert.embeddings.word_embeddings.weight
    bench.run.model.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    bench.step([batch])
    assert len(set(spy.keys)) == 1 and len(seen) == 3
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    first, second, third = (sequence_norms(delta) for delta in spy.deltas)
    assert not first.any()
    torch.testing.assert_close(second, torch.full_like(second, 0.1))
    assert third.min() > 0.1
    assert not any(delta[SITE][batch.inputs["attention_mask"] == 0].any() for delta in spy.deltas)


def test_any_split_of_a_step_gives_the_same_weights_after_several_steps() -> None:
    """A replay is a whole optimizer step: each micro-batch keeps a delta of its own."""
    whole = rows_of(make_batch(8, 9, seed=1), 0, 8)
    found = []
    for size in (8, 2, 1):
        bench = set_up([FreeAT(epsilon=0.15)], bert(0.0), whole, lr=LR)
        for _ in range(2):
            bench.step([rows_of(whole, i, i + size) for i in range(0, 8, size)])
        found.append(bench.parameters())
    assert max(apart(one, found[0]) for one in found[1:]) < EXACT


def test_padding_changes_no_step() -> None:
    batch, found = make_batch(), []
    for one in (batch, padded(batch, 4)):
        bench = set_up([FreeAT()], bert(0.0), one, lr=LR)
        bench.step([one]), bench.step([one])
        found.append(bench.parameters())
    assert apart(*found) < EXACT


def test_the_schedule_ticks_once_a_step() -> None:
    bench = set_up([FreeAT(steps=3)], bert(), make_batch(), lr=LR)
    bench.run.scheduler = torch.optim.lr_scheduler.StepLR(bench.run.optimizer, 1, gamma=0.5)
    rates: list[float] = []
    bench.run.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    bench.step([make_batch()]), bench.step([make_batch()])
    assert rates == [LR] * 3 + [LR / 2] * 3


def test_an_average_outside_follows_the_last_replay_once() -> None:
    batch = make_batch()
    bench = set_up([FreeAT(steps=3), EMA(decay=0.5)], bert(), batch, lr=LR)
    before = bench.parameters()
    bench.step([batch])
    after = bench.parameters()
    wanted = {k: 0.1 * before[k] + 0.9 * after[k] for k in before}  # the first step's decay is 1 / 10
    assert apart(bench.run.state("ema"), wanted) < EXACT


def test_with_a_tiny_rate_it_follows_the_path_of_freelb() -> None:
    """Where weights hardly move, the deltas are FreeLB's."""
    batch, seen = make_batch(), []
    for method in (FreeAT(steps=3), FreeLB(steps=3)):
        spy = Spy()
        set_up([method], bert(), batch, task=spy, lr=1e-14).step([batch])
        seen.append(spy.deltas)
    assert all(apart(a, b) < 1e-9 for a, b in zip(seen[0][1:], seen[1][1:], strict=True))


def test_cost_and_start() -> None:
    bench = set_up([FreeAT(start=1)], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 B S"
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 B S F4 B S F4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 9
    assert bench.effect("freeat", "delta_norm") > 0.1


def test_invariants() -> None:
    def stack() -> list[Any]:
        return [FreeAT(epsilon=0.15)]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=3)
