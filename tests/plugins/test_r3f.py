"""R3F against its formula, with the engine's own draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain import EXACT, LR, Plain, apart, bert, check_accumulation, check_loss_scale, check_padding, gradients, key
from torch import Tensor

from hybridengine.seams import Batch, KeyedRows
from hybridengine.seams.trace import cost_of
from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.adversarial.r3f import R3F
from hybridengine_plugins.regularize.rdrop import RDrop


def _noise(site: str, step: int, batch: Batch, sigma: float, kind: str) -> Tensor:
    rows = KeyedRows((0, f"r3f/{site}", step), batch.rows)
    shape = (batch.inputs["input_ids"].shape[1], 32)
    draws = rows.normal(*shape) if kind == "normal" else 2 * rows.uniform(*shape) - 1
    return sigma * draws.double() * batch.masks["perturbable"]["input_ids"].unsqueeze(-1)


def _with_special_tokens(batch: Batch) -> Batch:
    """The first token of each row may not be perturbed."""
    perturbable = batch.masks["perturbable"]["input_ids"].clone()
    perturbable[:, 0] = 0
    return replace(batch, masks={**batch.masks, "perturbable": {"input_ids": perturbable}})


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_matches_the_paper(kind: Any) -> None:
    """Aghajanyan et al. 2021, equation 5: both directions of the divergence, gradients through both sides."""
    batches = [_with_special_tokens(make_batch(seed=s)) for s in range(3)]
    bench, plain = set_up([R3F(weight=2.0, sigma=0.1, noise=kind)], bert(), batches[0], lr=LR), Plain(bert())
    (site,) = bench.run.sites.table  # type: ignore[union-attr]
    for step, batch in enumerate(batches):
        bench.step([batch])
        p = plain.logits(batch, key(step))
        q = plain.logits(batch, key(step), _noise(site, step, batch, 0.1, kind))
        loss = torch.nn.functional.cross_entropy(p, batch.targets) + 2.0 * (_kl(p, q) + _kl(q, p))
        plain.descend(plain.gradient(loss))
        assert apart(bench.parameters(), {k: x.detach() for k, x in plain.parameters.items()}) < EXACT


def test_weight_zero_is_plain_training() -> None:
    batch = make_batch()
    smooth = gradients(lambda: [R3F(weight=0.0)], [batch], bert())
    assert apart(smooth, gradients(list, [batch], bert())) < EXACT


def test_without_noise_the_divergence_is_exactly_zero() -> None:
    """Both passes share their dropout masks."""
    bench = set_up([R3F(sigma=0.0)], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.effect("r3f", "kl") == 0


def test_cost_is_one_more_pass() -> None:
    bench = set_up([R3F()], bert(), make_batch())
    bench.step([make_batch()])
    assert cost_of(bench.ctx.trace.events, 4) == 6
    assert bench.effect("r3f", "kl") > 0


def test_over_stacked_passes_it_compares_equal_masks() -> None:
    """The two views of `rdrop` cannot be replayed, so the clean prediction is made again."""
    bench = set_up([R3F(sigma=0.0), RDrop()], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.effect("r3f", "kl") == 0
    assert bench.effect("rdrop", "kl") > 0


def test_invariants() -> None:
    def stack() -> list[Any]:
        return [R3F(sigma=0.1)]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)
