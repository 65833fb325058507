"""What smoothness methods share: keyed noise, a view to come back to, the search for the worst direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from hybridengine.seams import View, keyed_noise, power_iteration, replayable
from hybridengine.testing import make_batch, set_up, tiny_bert

SITE = "bert.embeddings.word_embeddings"


def test_power_iteration_finds_the_first_eigenvector() -> None:
    """D(d) = d' H d / 2 with a gap between the first two eigenvalues; the error shrinks by their ratio, 1/2, a step."""
    made = set_up([], tiny_bert(num_labels=3).double(), make_batch())
    root = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    matrix = root @ torch.diag(torch.tensor([4.0, 2, 1, 1, 0.5, 0.1], dtype=torch.float64)) @ root.T
    start = {"site": torch.ones(1, 2, 3, dtype=torch.float64)}

    def divergence(delta: Mapping[str, Tensor]) -> Tensor:
        return delta["site"].flatten() @ matrix @ delta["site"].flatten() / 2

    def normalised(_: Mapping[str, Tensor], gradient: Sequence[Tensor | None]) -> dict[str, Tensor]:
        (g,) = gradient
        assert g is not None
        return {"site": g / g.norm()}

    cosines = []
    for steps in (1, 10, 40):
        made.ctx.trace.clear()
        found = power_iteration(made.ctx, divergence, start, normalised, steps=steps)["site"]
        assert not found.requires_grad
        assert made.ctx.trace.text() == " ".join(["G"] * steps)
        cosines.append(float((found.flatten() @ root[:, 0]).abs()))
    assert cosines[0] < cosines[1] < cosines[2] == pytest.approx(1, abs=1e-12)
    assert torch.equal(start["site"], torch.ones_like(start["site"]))


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_noise_is_a_rows_own_and_keeps_to_the_mask(distribution: str) -> None:
    made = set_up([], tiny_bert(num_labels=3).double(), make_batch())
    ctx = made.ctx
    short, long = make_batch(4, 7, padded=False), make_batch(2, 9, padded=False, first_row=2)
    a, b = (keyed_noise(ctx, batch, "mine", distribution)[SITE] for batch in (short, long))  # type: ignore[arg-type]
    assert torch.equal(a[2:], b[:, :7])
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, keyed_noise(ctx, short, "other", distribution)[SITE])  # type: ignore[arg-type]
    made.run.step += 1
    assert not torch.equal(a, keyed_noise(ctx, short, "mine", distribution)[SITE])  # type: ignore[arg-type]
    assert distribution == "normal" or (a.min() >= -1 and a.max() < 1 and a.std() == pytest.approx(3**-0.5, rel=0.1))
    assert distribution == "uniform" or a.std() == pytest.approx(1, rel=0.1)
    padded = make_batch()
    noise = keyed_noise(ctx, padded, "mine", distribution)[SITE]  # type: ignore[arg-type]
    assert not noise[padded.inputs["attention_mask"] == 0].any()


def test_an_evaluation_is_replayed_and_stacked_passes_are_made_again() -> None:
    batch, view = make_batch(), View(key=3)
    ctx = set_up([], tiny_bert(num_labels=3, hidden_dropout_prob=0.2).double(), batch).ctx
    (alone,) = ctx.outputs(batch, [view])
    ctx.trace.clear()
    at, logits = replayable(ctx, batch, View(key=99), alone)
    assert at is view and logits is alone.scores and not ctx.trace.events
    stacked = ctx.outputs(batch, [view, view.fork("other")])[0]
    ctx.trace.clear()
    at, logits = replayable(ctx, batch, view, stacked)
    assert at is view and ctx.trace.text() == "F4"
    assert torch.equal(logits, ctx.outputs(batch, [at])[0].scores)
