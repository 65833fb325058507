"""The core of SAM: two passes, weights restored, and the part of a gradient at right angles to another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridengine.seams import gradient_uphill, orthogonal
from hybridengine.seams.base import base_gradient, make_works
from hybridengine.testing import make_batch, set_up, tiny_bert


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_parts_add_up_at_right_angles(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 3, "b": 5, "c": 2}
    g, t = ({k: torch.randn(n, generator=generator).double() for k, n in sizes.items()} for _ in range(2))
    del t["c"]  # without a counterpart: no part of the product
    rest = orthogonal(g, t)
    assert rest.keys() == t.keys()
    assert float(sum((rest[k] * t[k]).sum() for k in t)) == pytest.approx(0, abs=1e-12)
    shares = torch.cat([(g[k] - rest[k]) / t[k] for k in t])
    torch.testing.assert_close(shares, shares[:1].expand_as(shares))


def test_nothing_is_orthogonal_to_itself_and_everything_to_zero() -> None:
    g = {"a": torch.randn(7), "b": torch.randn(3, 2)}
    assert all(not rest.any() for rest in orthogonal(g, g).values())
    zero = {name: torch.zeros_like(value) for name, value in g.items()}
    assert all(torch.equal(rest, g[name]) for name, rest in orthogonal(g, zero).items())


@pytest.mark.parametrize("keep", [False, True])
def test_it_leaves_the_gradient_uphill_and_tells_what_was_asked_for(keep: bool) -> None:
    batch = make_batch()
    bench = set_up([], tiny_bert(num_labels=3).double(), batch)
    ctx, before = bench.ctx, bench.parameters()
    works = make_works(0, 0, [batch])
    base_gradient(ctx, works)
    here = ctx.take_grads()
    found = gradient_uphill(ctx, base_gradient, works, rho=0.3, keep=keep, measure=keep)
    after = bench.parameters()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert found.gain is not None and found.gain > 0
    assert (found.distance, found.here != {}) == (pytest.approx(0.3) if keep else None, keep)
    assert all(torch.equal(found.here[name], here[name]) for name in found.here)
    norm = torch.stack([g.norm() for g in here.values()]).norm()
    with ctx.moved({name: 0.3 * g / norm for name, g in here.items()}):
        there = ctx.take_grads()
        base_gradient(ctx, works)
        wanted = ctx.take_grads()
    for name, value in wanted.items():
        torch.testing.assert_close(there[name], value)
