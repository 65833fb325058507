"""TAVAT against a reference written from the paper, and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    gradients,
    match,
    padded,
    rows_of,
    unit,
)
from torch import Tensor

from hybridengine.seams import Batch, KeyedRows, sequence_norms
from hybridengine.seams.trace import cost_of
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_t5
from hybridengine_plugins.adversarial.sam import SAM
from hybridengine_plugins.adversarial.tavat import TAVAT

SITE = "bert.embeddings.word_embeddings"


def draws(stream: str, step: int, rows: Any, *shape: int) -> Tensor:
    return 2 * KeyedRows((0, f"tavat/{stream}{SITE}", step), rows).uniform(*shape).double() - 1


def per_token(g: Tensor) -> Tensor:
    return g / g.norm(dim=2, keepdim=True).clamp_min(1e-300)


def reference(steps: int, step_size: float, epsilon: float, init: float) -> Any:
    """Li and Qiu, algorithm 1, with the projection of their code; a table of one row for each word."""
    count = iter(range(100))
    table: list[Tensor] = []

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        step, ids = next(count), batch.inputs["input_ids"]
        words, width = plain.embedding.weight.shape
        if not table:
            table.append(init / width**0.5 * draws("table/", 0, range(words), width))
        mask = batch.inputs["attention_mask"].double().unsqueeze(-1)
        lengths = mask.sum((1, 2)).view(-1, 1, 1)
        delta = init * mask * draws("", step, batch.rows, ids.shape[1], width) / (lengths * width).sqrt()
        eta, total = table[0][ids] * mask, dict[str, Tensor]()
        for _ in range(steps):
            size = (delta + eta).flatten(1).norm(dim=1).view(-1, 1, 1)
            delta, eta = (torch.where(size > epsilon, x * epsilon / size, x) for x in (delta, eta))
            both = (delta + eta).detach().requires_grad_()
            loss = plain.loss(batch, seed, both)
            g = torch.autograd.grad(loss, both, retain_graph=True)[0]
            for name, value in plain.gradient(loss).items():
                total[name] = total.get(name, 0) + value / steps
            delta, eta = delta + step_size * unit(g), eta + step_size * per_token(g)
            norms = eta.norm(dim=2, keepdim=True)
            eta = eta * norms / norms.amax(1, keepdim=True)
        size = (delta + eta).flatten(1).norm(dim=1).view(-1, 1, 1)
        eta = torch.where(size > epsilon, eta * epsilon / size, eta)
        for word in {int(i) for i in ids[mask[..., 0] != 0]}:
            table[0][word] = eta[(ids == word) & (mask[..., 0] != 0)].mean(0)
        return total

    return gradient


@pytest.mark.parametrize(
    ("steps", "step_size", "epsilon", "init"), [(2, 0.1, 0.4, 0.3), (3, 0.3, 0.5, 0.6), (1, 0.2, 5.0, 0.1)]
)
def test_matches_the_paper(steps: int, step_size: float, epsilon: float, init: float) -> None:
    method = TAVAT(steps=steps, step_size=step_size, epsilon=epsilon, init=init)
    match(method, reference(steps, step_size, epsilon, init))


def test_epsilon_zero_is_plain_training() -> None:
    batch = make_batch()
    attacked = gradients(lambda: [TAVAT(epsilon=0.0)], [batch], bert())
    assert apart(attacked, gradients(list, [batch], bert())) < EXACT


def test_the_table_lives_in_run_state_and_words_that_were_not_seen_keep_theirs() -> None:
    batch = make_batch()
    bench = set_up([TAVAT()], bert(), batch)
    bench.step([batch])
    table = bench.run.state("tavat")[SITE]
    first = 0.3 / 32**0.5 * draws("table/", 0, range(len(table)), 32)
    seen = sorted({int(i) for i in batch.inputs["input_ids"][batch.inputs["attention_mask"] != 0]})
    unseen = [word for word in range(len(table)) if word not in seen]
    assert 0 in unseen  # the padding's
    torch.testing.assert_close(table[unseen], first[unseen])
    assert (table[seen] - first[seen]).norm(dim=1).min() > 1e-3


def test_a_step_reads_one_table_and_writes_the_mean_over_all_micro_batches() -> None:
    whole = rows_of(make_batch(8, 9, seed=1), 0, 8)
    tables = []
    for size in (8, 2, 1):
        bench = set_up([TAVAT()], bert(0.0), whole)
        for _ in range(2):
            bench.step([rows_of(whole, i, i + size) for i in range(0, 8, size)])
        tables.append({"table": bench.run.state("tavat")[SITE]})
    assert max(apart(table, tables[0]) for table in tables[1:]) < EXACT


def test_the_table_does_not_grow_with_how_often_a_word_stands() -> None:
    """The published code adds up; a word's row must stay within the ball, also after many steps of frequent words."""
    batch = make_batch(vocabulary=6)
    bench = set_up([TAVAT(epsilon=0.4)], bert(), batch)
    for _ in range(6):
        bench.step([batch])
        table = bench.run.state("tavat")[SITE]
        words = batch.inputs["input_ids"].unique()
        assert table[words[words > 0]].norm(dim=1).max() < 2 * 0.4


def test_padding_and_loss_scale_also_once_the_table_has_learned() -> None:
    batch = make_batch()
    found = []
    for one, scale in ((batch, 1.0), (padded(batch, 4), 1.0), (batch, 1024.0)):
        bench = set_up([TAVAT()], bert(0.0), one, loss_scale=scale)
        bench.step([one])
        found.append(bench.gradients([one]))
    assert max(apart(one, found[0]) for one in found[1:]) < EXACT


@settings(max_examples=10, deadline=None)
@given(init=st.floats(0.01, 2), size=st.integers(1, 4), length=st.integers(4, 9), epsilon=st.floats(0.05, 1))
def test_start_and_path_keep_to_mask_and_ball(init: float, size: int, length: int, epsilon: float) -> None:
    batch, spy = make_batch(size, length, seed=3), Spy()
    bench = set_up([TAVAT(init=init, epsilon=epsilon, steps=3)], bert(), batch, task=spy)
    for _ in range(2):
        bench.step([batch])
    assert len(spy.deltas) == 6 and len(set(spy.keys[:3])) == 1
    for delta in spy.deltas:
        assert 0 < sequence_norms(delta).max() <= epsilon * (1 + 1e-9)
        assert not any(moved[batch.inputs["attention_mask"] == 0].any() for moved in delta.values())


def test_both_sites_of_t5_have_their_tables() -> None:
    batch, task = make_batch(kind="seq2seq"), SimpleTask("tokens")
    bench = set_up([TAVAT()], tiny_t5().double(), batch, task=task)
    plain = gradients(list, [batch], tiny_t5().double(), task=task)
    assert apart(bench.gradients([batch]), plain) > 1e-4
    tables = bench.run.state("tavat")
    assert {len(table) for table in tables.values()} == {bench.run.model.config.vocab_size}
    assert len(tables) == 2


def test_within_sam_the_table_learns_once_a_step() -> None:
    batch = make_batch()
    bench = set_up([TAVAT(), SAM(rho=0.0)], bert(0.0), batch, lr=LR)
    alone = set_up([TAVAT()], bert(0.0), batch, lr=LR)
    for _ in range(2):
        bench.step([batch]), alone.step([batch])
    assert apart(bench.run.state("tavat"), alone.run.state("tavat")) < EXACT
    assert apart(bench.parameters(), alone.parameters()) < EXACT


def test_cost_and_start() -> None:
    bench = set_up([TAVAT(start=1)], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 B S"
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 b F4 B S"
    assert cost_of(bench.ctx.trace.events, 4) == 6
    assert bench.effect("tavat", "delta_norm") == pytest.approx(0.4, rel=0.5)


def test_invariants() -> None:
    def stack() -> list[Any]:
        return [TAVAT()]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
    check_restores(stack, forwards=2)
