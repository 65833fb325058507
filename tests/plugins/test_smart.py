"""SMART and ALUM against a reference written from the papers, and their invariants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    check_restores,
    gradients,
    key,
    kl,
    match,
)
from torch import Tensor
from torch.nn import functional

from hybridengine.seams import Batch, Context, KeyedRows
from hybridengine.seams.precision import Precision
from hybridengine.seams.trace import cost_of
from hybridengine.testing import make_batch, set_up, tiny_bert
from hybridengine_plugins.adversarial.smart import ALUM, SMART
from hybridengine_plugins.regularize.rdrop import RDrop

SITE = "bert.embeddings.word_embeddings"


def symmetric(p: Tensor, q: Tensor) -> Tensor:
    return kl(p, q) + kl(q, p)


def reference(
    method: str, sigma: float, step_size: float, epsilon: float, steps: int, proximal: float = 0.0, decay: float = 0.9
) -> Any:
    """Jiang et al., algorithm 1 with the momentum of section 3.2; without the proximal term Liu et al., algorithm 1."""
    count = iter(range(100))
    average: dict[str, Tensor] = {}

    def at_average(plain: Plain, batch: Batch, seed: int) -> Tensor:
        kept = {k: p.detach().clone() for k, p in plain.parameters.items()}
        for k, p in plain.parameters.items():
            p.data.copy_(average[k])
        with torch.no_grad():
            logits = plain.logits(batch, seed)
        for k, p in plain.parameters.items():
            p.data.copy_(kept[k])
        return logits

    def gradient(plain: Plain, batch: Batch, seed: int) -> dict[str, Tensor]:
        for k, p in plain.parameters.items():  # the average follows the update made since the last call
            average[k] = decay * average[k] + (1 - decay) * p.detach() if average.get(k) is not None else p.detach() + 0
        before = at_average(plain, batch, seed)
        mask = batch.inputs["attention_mask"].double().unsqueeze(-1)
        shape = plain.zeros(batch).shape[1:]
        noise = KeyedRows((0, f"{method}/{SITE}", next(count)), batch.rows).normal(*shape).double()
        delta, clean = sigma * noise * mask, plain.logits(batch, seed)
        for _ in range(steps):
            delta = delta.detach().requires_grad_()
            g = torch.autograd.grad(symmetric(clean.detach(), plain.logits(batch, seed, delta)), delta)[0]
            unit = functional.normalize(g, p=float("inf"), dim=-1)
            delta = torch.minimum(torch.maximum(delta + step_size * unit, delta * 0 - epsilon), delta * 0 + epsilon)
        loss = plain.loss(batch, seed) + 0.7 * symmetric(clean, plain.logits(batch, seed, delta.detach()))
        return plain.gradient(loss + proximal * symmetric(clean, before))

    return gradient


CASES = [(0.01, 0.02, 0.02, 1), (0.05, 0.1, 0.08, 3)]


@pytest.mark.parametrize(("sigma", "step_size", "epsilon", "steps"), CASES)
def test_alum_matches_the_paper(sigma: float, step_size: float, epsilon: float, steps: int) -> None:
    method = ALUM(weight=0.7, sigma=sigma, step_size=step_size, epsilon=epsilon, steps=steps)
    match(method, reference("alum", sigma, step_size, epsilon, steps))


@pytest.mark.parametrize(("sigma", "step_size", "epsilon", "steps"), CASES)
def test_smart_matches_the_paper(sigma: float, step_size: float, epsilon: float, steps: int) -> None:
    method = SMART(weight=0.7, sigma=sigma, step_size=step_size, epsilon=epsilon, steps=steps, proximal=2.0, decay=0.9)
    bench = match(method, reference("smart", sigma, step_size, epsilon, steps, 2.0))
    assert bench.effect("smart", "proximal_kl") > 0


def test_the_average_is_that_of_the_recursion_and_is_kept_in_run_state() -> None:
    batch, decay = make_batch(), 0.8
    bench = set_up([SMART(decay=decay)], bert(), batch, lr=LR)
    wanted = bench.parameters()
    for _ in range(3):
        bench.step([batch])
        wanted = {k: decay * wanted[k] + (1 - decay) * p for k, p in bench.parameters().items()}
        assert apart(bench.run.state("smart"), wanted) < EXACT


def test_without_the_proximal_term_it_is_alum() -> None:
    batch = make_batch()

    class Alum(ALUM):
        name = "smart"  # the name keys the noise

    one, other = (gradients(lambda m=m: [m], [batch], bert()) for m in (SMART(proximal=0.0), Alum()))
    assert apart(one, other) == 0.0
    bench = set_up([SMART(proximal=0.0)], bert(), batch)
    bench.step([batch])
    assert not bench.run.state("smart")


def test_at_first_the_proximal_term_is_exactly_zero_and_changes_no_gradient() -> None:
    """Average and weights are equal and see equal dropout masks."""
    batch = make_batch()
    bench = set_up([SMART()], bert(0.2), batch)
    assert float(bench.step([batch])["smart_proximal"]) == 0.0
    near, alone = (gradients(lambda p=p: [SMART(proximal=p)], [batch], bert(0.2)) for p in (5.0, 0.0))
    assert apart(near, alone) < EXACT


@pytest.mark.parametrize("method", [ALUM, SMART])
def test_weight_zero_is_plain_training(method: Any) -> None:
    batch = make_batch()
    smooth = gradients(lambda: [method(weight=0.0)], [batch], bert())
    assert apart(smooth, gradients(list, [batch], bert())) < EXACT


@pytest.mark.parametrize("stacked", [False, True])
def test_masks_are_replayed_also_around_rdrop(stacked: bool) -> None:
    """In a box of width 0 the divergence is exactly 0 only if all passes drew the same masks."""
    bench = set_up([RDrop(), SMART(epsilon=0.0)], bert(0.2), make_batch(), stack_views=stacked)
    terms = bench.step([make_batch()])
    assert float(terms["smart"]) == pytest.approx(0, abs=1e-15)
    assert float(terms["smart_proximal"]) == pytest.approx(0, abs=1e-15)


def deltas_of(method: Any, batch: Batch, model: Any = None, **options: Any) -> list[Tensor]:
    """The deltas of each evaluation but the first, in order."""
    seen: list[Tensor] = []
    bench = set_up([method], model or bert(0.0), batch, **options)
    outputs: Callable[..., Any] = Context.outputs

    def watched(batch: Batch, views: Sequence[Any], **more: Any) -> Any:
        seen.extend(view.delta[SITE].detach().double() for view in views if view.delta)
        return outputs(bench.ctx, batch, views, **more)

    bench.ctx.outputs = watched  # type: ignore[method-assign]
    bench.step([batch])
    return seen


def test_every_token_keeps_to_its_own_box_and_padding_does_not_move() -> None:
    batch = make_batch(4, 9, seed=2)
    start, moved = deltas_of(ALUM(sigma=1e-4, step_size=0.03, epsilon=0.02), batch)
    real = batch.inputs["attention_mask"] != 0
    assert not start[~real].any() and not moved[~real].any()
    # The largest coordinate of each token moves by 0.03 and is cut to the box; no other token's gradient matters.
    torch.testing.assert_close(moved[real].abs().amax(-1), torch.full_like(moved[real][:, 0], 0.02))


def test_special_tokens_that_may_not_be_perturbed_do_not_move() -> None:
    batch = make_batch()
    mask = batch.masks["perturbable"]["input_ids"].clone()
    mask[:, 0] = 0
    batch.masks["perturbable"]["input_ids"] = mask  # type: ignore[index]
    for delta in deltas_of(ALUM(steps=2), batch):
        assert not delta[:, 0].any()


def direction(model: Any, sigma: float, precision: Precision) -> Tensor:
    """Where one step leads from the random start, as the method computes it, in one number format."""
    method = ALUM(sigma=sigma, step_size=1.0, epsilon=10.0)
    start, moved = deltas_of(method, make_batch(), model, precision=precision)
    return (moved - start).flatten(1)


@pytest.mark.parametrize(
    "precision", [Precision("fp32", None), Precision("bf16", torch.bfloat16)], ids=lambda p: p.name
)
def test_the_default_start_finds_the_direction_in_each_number_format(precision: Precision) -> None:
    exact = direction(tiny_bert(num_labels=3).double(), 1e-4, Precision("fp32", None))
    found = direction(tiny_bert(num_labels=3), ALUM().sigma, precision)
    assert functional.cosine_similarity(found, exact).min() > 0.95


def test_the_published_start_drowns_in_bf16() -> None:
    bf16 = Precision("bf16", torch.bfloat16)
    exact = direction(tiny_bert(num_labels=3).double(), 1e-4, Precision("fp32", None))
    found = direction(tiny_bert(num_labels=3), 1e-5, bf16)
    assert functional.cosine_similarity(found, exact).mean() < 0.7


def test_cost() -> None:
    for method, text, cost in (
        (ALUM(), "F4 F4 G F4 B S", 8),
        (SMART(), "F4 F4 G F4 f4 B S", 9),
        (SMART(steps=2), "F4 F4 G F4 G F4 f4 B S", 11),
    ):
        bench = set_up([method], bert(), make_batch())
        bench.step([make_batch()])
        assert bench.ctx.trace.text() == text
        assert cost_of(bench.ctx.trace.events, 4) == cost


def test_the_search_leaves_parameter_gradients_alone() -> None:
    """The gradient is that of the terms alone: the same as of the terms at the delta found, given."""
    batch = make_batch()
    plain = Plain(bert(0.0))
    delta = deltas_of(ALUM(), batch)[-1]
    clean = plain.logits(batch, key(0))
    wanted = plain.gradient(plain.loss(batch, key(0)) + symmetric(clean, plain.logits(batch, key(0), delta)))
    assert apart(gradients(lambda: [ALUM()], [batch], bert(0.0)), wanted) < EXACT


def test_invariants() -> None:
    for stack in (lambda: [ALUM(sigma=0.05, epsilon=0.1, step_size=0.1)], lambda: [SMART(steps=2)]):
        check_accumulation(stack)
        check_padding(stack)
        check_loss_scale(stack)
    check_restores(lambda: [SMART()], forwards=4)
