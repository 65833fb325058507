"""FreeLB against a reference written from the paper, and its invariants."""

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

from hybridengine.seams import Batch, KeyedRows, sequence_norms
from hybridengine.seams.trace import cost_of
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_t5
from hybridengine_plugins.adversarial.freelb import FreeLB

SITE = "bert.embeddings.word_embeddings"


def reference(steps: int, step_size: float, epsilon: float | None, init: float = 0.0) -> Any:
    """Zhu et al., algorithm 1: gradients of all ascent steps accumulate with 1/K, one parameter update."""
    count = iter(range(100))

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        zero = plain.zeros(batch)
        mask = batch.inputs["attention_mask"].double().unsqueeze(-1)
        length, width = mask.sum((1, 2)).view(-1, 1, 1), zero.shape[-1]
        uniform = KeyedRows((0, f"freelb/{SITE}", next(count)), batch.rows).uniform(*zero.shape[1:]).double()
        delta = init * mask * (2 * uniform - 1) / (length * width).sqrt()
        total: dict[str, Tensor] = {}
        for _ in range(steps):
            delta = delta.detach().requires_grad_()
            loss = plain.loss(batch, seed, delta)
            g = torch.autograd.grad(loss, delta, retain_graph=True)[0]
            for name, value in plain.gradient(loss).items():
                total[name] = total.get(name, 0) + value / steps
            delta = delta + step_size * unit(g)
            size = delta.flatten(1).norm(dim=1).view(-1, 1, 1)
            delta = delta if epsilon is None else torch.where(size > epsilon, delta * epsilon / size, delta)
        return total

    return gradient


@pytest.mark.parametrize(
    ("steps", "step_size", "epsilon", "init"), [(3, 0.1, None, 0.0), (2, 0.5, 0.3, 0.0), (4, 0.2, 0.5, 0.6)]
)
def test_matches_the_paper(steps: int, step_size: float, epsilon: float | None, init: float) -> None:
    method = FreeLB(steps=steps, step_size=step_size, epsilon=epsilon, init=init)
    match(method, reference(steps, step_size, epsilon, init))


def test_one_step_from_zero_is_plain_training() -> None:
    batch = make_batch()
    assert apart(gradients(lambda: [FreeLB(steps=1)], [batch], bert()), gradients(list, [batch], bert())) < EXACT


def test_epsilon_zero_is_plain_training() -> None:
    batch = make_batch()
    attacked = gradients(lambda: [FreeLB(epsilon=0.0)], [batch], bert())
    assert apart(attacked, gradients(list, [batch], bert())) < EXACT


def test_steps_share_one_dropout_mask() -> None:
    spy = Spy()
    set_up([FreeLB(steps=3)], bert(), make_batch(), task=spy).step([make_batch()])
    assert len(spy.keys) == 3
    assert len(set(spy.keys)) == 1


def test_cost_is_steps_full_passes() -> None:
    bench = set_up([FreeLB(steps=3)], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 b F4 b F4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 9
    assert bench.effect("freelb", "delta_norm") > 0


@settings(max_examples=10, deadline=None)
@given(init=st.floats(0.01, 2), size=st.integers(1, 4), length=st.integers(4, 9), epsilon=st.floats(0.05, 1))
def test_start_and_path_keep_to_mask_and_ball(init: float, size: int, length: int, epsilon: float) -> None:
    batch, spy = make_batch(size, length, seed=3), Spy()
    set_up([FreeLB(init=init, epsilon=epsilon, steps=3)], bert(), batch, task=spy).step([batch])
    start, *path = spy.deltas
    # Every coordinate lies in +-init / sqrt(n D), so the norm of a sequence is at most init.
    assert 0 < sequence_norms(start).min() <= sequence_norms(start).max() <= init
    assert all(sequence_norms(delta).max() <= epsilon * (1 + 1e-9) for delta in path)
    for delta in spy.deltas:
        assert not any(moved[batch.inputs["attention_mask"] == 0].any() for moved in delta.values())


def test_random_start_is_joint_over_both_sites_of_t5() -> None:
    batch, spy = make_batch(kind="seq2seq"), Spy("tokens")
    set_up([FreeLB(init=1.0)], tiny_t5().double(), batch, task=spy).step([batch])
    start = spy.deltas[0]
    assert len(start) == 2
    norms = sequence_norms(start)
    # U(-1, 1) has variance 1/3: over some hundred coordinates the norm is init / sqrt(3) within a tenth.
    torch.testing.assert_close(norms, torch.full_like(norms, 3**-0.5), rtol=0.1, atol=0)
    plain = gradients(list, [batch], tiny_t5().double(), task=SimpleTask("tokens"))
    assert apart(gradients(lambda: [FreeLB()], [batch], tiny_t5().double(), task=SimpleTask("tokens")), plain) > 1e-4


def test_random_start_differs_between_steps_and_repeats_between_runs() -> None:
    batch, seen = make_batch(), []
    for _ in range(2):
        spy = Spy()
        bench = set_up([FreeLB(init=1.0, steps=1)], bert(), batch, task=spy)
        bench.step([batch])
        bench.step([batch])
        seen.append([delta[SITE] for delta in spy.deltas])
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][0], seen[0][1])


def test_shared_between_passes_of_an_outer_method() -> None:
    batch, spy = make_batch(), Spy()
    bench = set_up([FreeLB(steps=3)], bert(), batch, task=spy)
    inner = bench.ctx.gradient

    def twice(ctx: Any, works: Any) -> Any:
        with ctx.sharing():
            inner(ctx, works)
            ctx.take_grads()
            return inner(ctx, works)

    bench.ctx.gradient = twice
    bench.step([batch])
    assert all(torch.equal(spy.deltas[t][SITE], spy.deltas[t + 3][SITE]) for t in range(3))


def test_invariants() -> None:
    for stack in (lambda: [FreeLB(init=0.5)], lambda: [FreeLB(epsilon=0.15)]):
        check_accumulation(stack)
        check_padding(stack)
        check_loss_scale(stack)
    check_restores(lambda: [FreeLB()], forwards=3)
