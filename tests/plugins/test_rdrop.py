"""R-Drop against a reference written from the paper, and its invariants."""

from __future__ import annotations

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
    check_restores,
    gradients,
    kl,
    match,
)
from torch import Tensor

from hybridengine.seams import Batch, kl_rows, mix
from hybridengine.seams.trace import cost_of
from hybridengine.stack import check_stack
from hybridengine.stack.resolve import as_method
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.fgm import FGM
from hybridengine_plugins.regularize.rdrop import RDrop


def reference(alpha: float) -> Any:
    """Liang et al., equations 2 to 4, with the mean of both cross-entropies in place of their sum."""

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        seeds = [mix(seed, "rdrop", i) for i in (0, 1)]
        p, q = (plain.logits(batch, s) for s in seeds)
        ce = sum(torch.nn.functional.cross_entropy(x, batch.targets) for x in (p, q)) / 2
        return plain.gradient(ce + alpha * (kl(p, q) + kl(q, p)) / 2)

    return gradient


@pytest.mark.parametrize("alpha", [1.0, 5.0])
def test_matches_the_paper(alpha: float) -> None:
    match(RDrop(alpha=alpha), reference(alpha), stack_views=False)


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_without_dropout_the_divergence_is_exactly_zero(kind: str) -> None:
    batch = make_batch(kind=kind)

    def model() -> Any:
        return bert(0.0) if kind == "rows" else tiny_bert("AutoModelForTokenClassification", num_labels=3).double()

    task = SimpleTask(kind)
    bench = set_up([RDrop()], model(), batch, task=task, stack_views=False)
    gradient = bench.gradients([batch])
    assert bench.effect("rdrop", "kl") == 0
    assert apart(gradient, gradients(list, [batch], model(), task=task)) < EXACT


def test_stacked_equals_looped_without_dropout() -> None:
    """One doubled batch or two passes; with an attack whose delta both share."""
    batch = make_batch()

    def stack() -> list[object]:
        return [RDrop(alpha=2.0), FGM(epsilon=0.5)]

    looped = gradients(stack, [batch], bert(0.0), stack_views=False)
    assert apart(gradients(stack, [batch], bert(0.0), stack_views=True), looped) < EXACT


@pytest.mark.parametrize("stacked", [False, True])
def test_the_two_masks_differ(stacked: bool) -> None:
    bench = set_up([RDrop()], bert(), make_batch(), stack_views=stacked)
    bench.step([make_batch()])
    assert bench.effect("rdrop", "kl") > 1e-4
    assert bench.ctx.trace.text() == ("F8 B S" if stacked else "F4 F4 B S")
    assert cost_of(bench.ctx.trace.events, 4) == 6


def test_masks_repeat_over_the_passes_of_an_attack() -> None:
    spy = Spy()
    set_up([RDrop(), FGM()], bert(), make_batch(), task=spy, stack_views=False).step([make_batch()])
    assert spy.keys[:2] == spy.keys[2:]
    assert spy.keys[0] != spy.keys[1]


def test_alpha_zero_is_the_mean_over_two_masks() -> None:
    match(RDrop(alpha=0.0), reference(0.0), stack_views=False)


def test_duplicated_rows_leave_the_mean_divergence_alone() -> None:
    """The divergence is a sum over rows with the unit rows, so its weight does not grow with the batch."""
    batch = make_batch()
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    one = kl_rows(p, q, batch) / batch.size
    twice = kl_rows(torch.cat([p, p]), torch.cat([q, q]), batch.repeat(2)) / (2 * batch.size)
    torch.testing.assert_close(one, twice)
    torch.testing.assert_close(one, kl(p, q))
    # The same through the method: a step over the same rows twice has the same terms as over them once.
    model_terms = [
        set_up([RDrop()], bert(0.0), batch, stack_views=False).step(batches)["rdrop"]
        for batches in ([batch], [batch, batch])
    ]
    torch.testing.assert_close(model_terms[0], model_terms[1])


def test_needs_a_model_with_dropout() -> None:
    (problem,) = check_stack([as_method(RDrop())], {"embeddings", "labels"})
    assert "rdrop" in problem
    assert "dropout" in problem
    assert check_stack([as_method(RDrop())], {"dropout"}) == []


def test_invariants() -> None:
    for stacked in (False, True):
        check_accumulation(lambda: [RDrop()], stack_views=stacked)
        check_padding(lambda: [RDrop()], stack_views=stacked)
        check_loss_scale(lambda: [RDrop()], stack_views=stacked)
        check_restores(lambda: [RDrop()], forwards=1 if stacked else 2, stack_views=stacked)
