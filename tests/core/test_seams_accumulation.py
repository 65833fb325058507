"""Any split of a step into micro-batches gives the same gradient, for terms of every unit at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook
from hybridengine.seams import Batch, Context, Out, View, Work, kl_rows
from hybridengine.testing import SimpleTask, make_batch, set_up, tiny_bert


@dataclass(eq=False)
class Mixed:
    """Beside the task's token term: a per-sequence divergence from keyed noise, and a term over unlabelled rows.

    Core tests may not import plugins, so this stands for the methods that have such terms.
    """

    name = "mixed"
    traits = Traits(order=Band.SMOOTHNESS)

    def _spread(self, ctx: Context, batch: Batch, view: View) -> Tensor:
        noise = {
            site: 0.3 * ctx.rng(site, batch.rows).normal(*zero.shape[1:]).to(zero) * ctx.mask(batch, site).unsqueeze(-1)
            for site, zero in ctx.zeros(batch).items()
        }
        still, moved = (ctx.outputs(batch, [v])[0].scores for v in (view, view.plus(noise)))
        return kl_rows(still, moved, batch)

    @hook
    def wrap_loss(self, inner: Any, ctx: Context, batch: Batch, view: View) -> Out:
        out = inner(ctx, batch, view)
        other = batch.parts["unlabelled"]
        terms = {
            "spread": (self._spread(ctx, batch, view), "rows"),
            "everywhere": (self._spread(ctx, other, view.clean().fork("u")), "all_rows"),
        }
        return replace(out, terms={**out.terms, **terms})


@dataclass(eq=False)
class Attack:
    """One ascent step per sequence, then a pass at its end, as embedding attacks do it."""

    name = "attack"
    traits = Traits(order=Band.EMBEDDING_ATTACK)

    @hook
    def wrap_backward(self, inner: Any, ctx: Context, work: Work) -> Any:
        leaves = {site: zero.requires_grad_() for site, zero in ctx.zeros(work.batch).items()}
        with ctx.no_sync():
            inner(ctx, work.scaled(0.5).at(work.view.plus(leaves)))
        delta = ctx.ascend(work.batch, leaves, [leaf.grad for leaf in leaves.values()], step_size=0.7)
        return inner(ctx, work.scaled(0.5).at(work.view.plus(delta)))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch, with padding cropped to the longest of them."""
    length = int(batch.inputs["attention_mask"][start:stop].sum(1).max())
    targets = batch.targets[start:stop, :length]
    parts = {name: cut(part, start, stop) for name, part in batch.parts.items()}
    rows = stop - start
    return replace(
        batch,
        inputs={k: x[start:stop, :length] for k, x in batch.inputs.items()},
        targets=targets,
        rows=batch.rows[start:stop],
        masks={kind: {k: x[start:stop, :length] for k, x in m.items()} for kind, m in batch.masks.items()},
        counts={"rows": rows, "tokens": int((targets != -100).sum()), "all_rows": rows * (1 + len(parts))},
        parts=parts,
    )


def gradient(batches: Sequence[Batch], dtype: torch.dtype, methods: Sequence[object]) -> dict[str, Tensor]:
    model = tiny_bert("AutoModelForTokenClassification", num_labels=3).to(dtype)
    return set_up(methods, model, batches[0], task=SimpleTask("tokens")).gradients(batches)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    square = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return (square / sum(float(x.double().square().sum()) for x in b.values())) ** 0.5


UNLABELLED = make_batch(8, 9, seed=5, kind="tokens", first_row=90)
WHOLE = cut(make_batch(8, 9, seed=1, kind="tokens", parts={"unlabelled": UNLABELLED}), 0, 8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_one_of_eight_four_of_two_eight_of_one(dtype: torch.dtype, tolerance: float) -> None:
    methods = (Mixed(), Attack())
    whole = gradient([WHOLE], dtype, methods)
    for size in (2, 1):
        parts = [cut(WHOLE, i, i + size) for i in range(0, 8, size)]
        assert apart(gradient(parts, dtype, methods), whole) < tolerance


@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, 7), min_size=1, max_size=4))
def test_any_uneven_split(cuts: set[int]) -> None:
    """Micro-batches of other sizes hold other numbers of tokens: a mean of means would be up to 50% off."""
    edges = [0, *sorted(cuts), 8]
    parts = [cut(WHOLE, a, b) for a, b in pairwise(edges)]
    assert apart(gradient(parts, torch.float64, [Mixed()]), gradient([WHOLE], torch.float64, [Mixed()])) < 1e-10


def test_the_order_of_micro_batches_does_not_matter() -> None:
    parts = [cut(WHOLE, i, i + 2) for i in range(0, 8, 2)]
    forwards = gradient(parts, torch.float64, [Mixed()])
    assert apart(gradient(parts[::-1], torch.float64, [Mixed()]), forwards) < 1e-10


def test_terms_add_up_to_the_means_of_the_whole_step() -> None:
    model = tiny_bert("AutoModelForTokenClassification", num_labels=3).double()
    bench = set_up([Mixed()], model, WHOLE, task=SimpleTask("tokens"))
    whole = bench.step([WHOLE])
    bench.run.step = 0
    split = bench.step([cut(WHOLE, 0, 3), cut(WHOLE, 3, 8)])
    assert set(whole) == {"loss", "spread", "everywhere", "gradient_norm"}
    for name in whole:
        torch.testing.assert_close(split[name].double(), whole[name].double(), rtol=1e-6, atol=0)
