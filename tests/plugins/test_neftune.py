"""NEFTune against its formula, with the engine's own draws; where the noise goes and where it does not."""

from __future__ import annotations

from typing import Any

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
    gradients,
    key,
)
from torch import Tensor

from hybridengine.seams import Batch, KeyedRows
from hybridengine.testing import make_batch, set_up
from hybridengine_plugins.adversarial.neftune import NEFTune
from hybridengine_plugins.adversarial.pgd import PGD


def _noise(site: str, step: int, batch: Batch, alpha: float) -> Tensor:
    """Jain et al. 2024, algorithm 1, for each row by its own length."""
    mask = batch.inputs["attention_mask"]
    u = KeyedRows((0, f"neftune/{site}", step), batch.rows).uniform(mask.shape[1], 32).double()
    lengths = mask.sum(1).double().view(-1, 1, 1)
    return alpha / (lengths * 32).sqrt() * (2 * u - 1) * mask.unsqueeze(-1)


def test_matches_the_paper() -> None:
    batches = [make_batch(seed=s) for s in range(3)]
    bench, plain = set_up([NEFTune(alpha=5.0)], bert(), batches[0], lr=LR), Plain(bert())
    (site,) = bench.run.sites.table  # type: ignore[union-attr]
    for step, batch in enumerate(batches):
        bench.step([batch])
        plain.descend(plain.gradient(plain.loss(batch, key(step), _noise(site, step, batch, 5.0))))
        assert apart(bench.parameters(), {k: p.detach() for k, p in plain.parameters.items()}) < EXACT


def test_alpha_zero_is_plain_training() -> None:
    batch = make_batch()
    noisy = gradients(lambda: [NEFTune(alpha=0.0)], [batch], bert())
    assert apart(noisy, gradients(list, [batch], bert())) < EXACT


def test_no_more_passes_than_a_plain_step() -> None:
    bench = set_up([NEFTune()], bert(), make_batch())
    bench.step([make_batch()])
    assert bench.ctx.trace.text() == "F4 B S"
    assert bench.effect("neftune", "noise_norm") > 0


def test_invariants() -> None:
    def stack() -> list[Any]:
        return [NEFTune(alpha=1.0)]

    check_accumulation(stack)
    check_padding(stack)
    check_loss_scale(stack)


def test_ascents_see_no_noise_and_the_training_pass_does() -> None:
    batch, spy = make_batch(), Spy()
    set_up([NEFTune(alpha=1.0), PGD(steps=1)], bert(), batch, task=spy).step([batch])
    (before,), (after,) = (list(delta.values()) for delta in spy.deltas)
    assert not before.any()
    moved = spy.deltas[1]
    site = next(iter(moved))
    attack = after - _noise(site, 0, batch, 1.0)
    norms = torch.linalg.vector_norm(attack.flatten(1), dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.05))  # one ascent of PGD's default step size
