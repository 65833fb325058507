"""The moving average: torch's lerp to the bit, for many tensors at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ISAS, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import native

IMPLS = ["reference"] if native.why_missing() else ["reference", "cpu"]
PAIRS = [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float64,) * 2]
SHAPES = [(), (0,), (1,), (7,), (16,), (33, 5), (64, 3), (2, 130)]


@st.composite
def updates(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], float]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    averages, weights = [], []
    for _ in range(draw(st.integers(0, 5))):
        shape, (dtype, other) = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(PAIRS))
        scale = draw(st.sampled_from([1e-30, 1.0, 1e30]))
        averages.append((torch.randn(shape, generator=generator) * scale).to(dtype))
        weight = (torch.randn(shape, generator=generator) * scale).to(other)
        weights.append(weight.t().contiguous().t() if weight.dim() == 2 and draw(st.booleans()) else weight)
    return averages, weights, draw(st.sampled_from([0.0, 1e-4, 0.001, 0.3, 0.4999, 0.5, 0.9, 1.0]))


def check(case: Any, impl: str, isa: str) -> None:
    """Two roundings of numbers up to |a| + |w|, and one of the factor; at the ends of the rate exactly."""
    averages, weights, rate = case
    old = [one.clone() for one in averages]
    before = kernels.set_isa(isa) if ISAS else ""
    try:
        kernels.ema_update(averages, weights, rate=rate, impl=impl)
    finally:
        if ISAS:
            kernels.set_isa(before)
    for average, was, weight in zip(averages, old, weights, strict=True):
        exact = was.double() + rate * (weight.double() - was.double())
        bound = 2 * torch.finfo(average.dtype).eps * (was.double().abs() + weight.double().abs()) + 1e-44
        assert bool(((average.double() - exact).abs() <= bound).all())
        if rate in (0, 1):
            assert torch.equal(average, weight.to(average.dtype) if rate else was)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=500, deadline=None)
@given(case=updates(), isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_formula(impl: str, case: Any, isa: str) -> None:
    check(case, impl, isa)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10_000, deadline=None)
@given(case=updates(), isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_formula_often(impl: str, case: Any, isa: str) -> None:
    check(case, impl, isa)


@needs_native
@pytest.mark.parametrize("rate", [0.001, 0.5, 0.9])
def test_over_many_chunks_and_threads(rate: float, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(200_003,), (70_000,), (5,)]
    start, weights = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        averages = [one.clone() for one in start]
        kernels.ema_update(averages, weights, rate=rate, impl="cpu")
        results.append(averages)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    expected = [torch.lerp(a, w, rate) for a, w in zip(start, weights, strict=True)]
    for got, one in zip(results[0], expected, strict=True):
        torch.testing.assert_close(got, one, rtol=0, atol=1e-6)  # fused or not: roundings of numbers up to 5


def test_not_finite_numbers_pass_and_wrong_arguments_are_named() -> None:
    average, weight = torch.zeros(20), torch.zeros(20)
    weight[[0, 17]] = torch.tensor([float("nan"), float("inf")])
    for impl in IMPLS:
        moved = average.clone()
        kernels.ema_update([moved], [weight], rate=0.1, impl=impl)
        assert bool(moved[0].isnan()) and bool(moved[17].isinf()) and not bool(moved[1:17].any())
    with pytest.raises(ValueError, match="rate must be"):
        kernels.ema_update([average], [weight], rate=1.5)
    with pytest.raises(ValueError, match="same shapes"):
        kernels.ema_update([average], [weight[:3]], rate=0.5)
    if "cpu" in IMPLS:
        with pytest.raises(KernelUnavailable, match="float32 or float64"):
            kernels.ema_update([average.bfloat16()], [weight.bfloat16()], rate=0.5, impl="cpu")
    kernels.ema_update([average.bfloat16()], [weight.bfloat16()], rate=0.5)
    strided = torch.zeros(4, 6).t()
    kernels.ema_update([strided], [torch.ones(6, 4)], rate=0.5)
    assert bool((strided == 0.5).all())
