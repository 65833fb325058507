"""The divergence of two predictions against float64 torch, over everything that changes a code path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import ISAS, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_pair_cases import (
    DIRECTIONS,
    GPU,
    IMPLEMENTATIONS,
    INTERPRETED,
    NATIVE,
    Case,
    assert_close_to_float64,
    cases,
    plain,
)

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import native
from hybridengine.kernels.kl_pair.reference import EDGE_ROWS, EdgeRow

INF, NAN = float("inf"), float("nan")
in_one_process = pytest.mark.skipif(INTERPRETED, reason="the tests by CPU implementations run without the interpreter")


def on_isa(isa: str, case: Case) -> None:
    before = kernels.set_isa(isa)
    try:
        assert_close_to_float64(case, "cpu")
    finally:
        kernels.set_isa(before)


@needs_native
@in_one_process
@settings(max_examples=500, deadline=None)
@given(case=cases(NATIVE), isa=st.sampled_from(ISAS or ["-"]))
def test_not_further_from_float64_than_twice_torch(case: Case, isa: str) -> None:
    on_isa(isa, case)


@pytest.mark.long
@pytest.mark.slow
@needs_native
@in_one_process
@settings(max_examples=10_000, deadline=None)
@given(case=cases(NATIVE), isa=st.sampled_from(ISAS or ["-"]))
def test_not_further_from_float64_than_twice_torch_in_many_cases(case: Case, isa: str) -> None:
    on_isa(isa, case)


@in_one_process
@settings(max_examples=100, deadline=None)
@given(case=cases([*NATIVE, torch.float16]))
def test_the_reference_is_as_exact_as_torch(case: Case) -> None:
    assert_close_to_float64(case, "reference")


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
@settings(max_examples=40, deadline=None)
@given(case=cases(GPU))
def test_triton_is_as_exact_as_torch(case: Case) -> None:
    assert_close_to_float64(case, "triton")


def rows_of(edge: EdgeRow, classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The row, spread over more classes that both sides exclude."""
    places = torch.linspace(0, classes - 1, 4).long()
    return tuple(
        torch.full((classes,), -INF, dtype=dtype).index_copy(0, places, torch.tensor(values, dtype=dtype))
        for values in (edge.a, edge.b)
    )  # type: ignore[return-value]


def exact_gradients(a: torch.Tensor, b: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of KL(p || q) by a and b where it is finite; a class without p has no part in it."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (a, b))
    u = torch.where(p > 0, torch.log(p) - torch.log(q), 0.0)
    return p * (u - (p * u).sum()) / temperature, (q - p) / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("classes", [4, 50, 2100])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("edge", EDGE_ROWS, ids=[edge.name for edge in EDGE_ROWS])
def test_rows_at_the_edge_are_those_of_the_table(edge: EdgeRow, impl: str, classes: int, temperature: float) -> None:
    for isa in (ISAS or ["-"]) if impl == "cpu" else [None]:
        before = isa and kernels.set_isa(isa)
        for dtype in NATIVE if impl == "cpu" else [torch.float32]:
            for direction in DIRECTIONS:
                check_edge(edge, impl, *rows_of(edge, classes, dtype), direction, temperature)
        if before:
            kernels.set_isa(before)


def check_edge(
    edge: EdgeRow, impl: str, row_a: torch.Tensor, row_b: torch.Tensor, direction: str, temperature: float
) -> None:
    a, b = (x[None].clone().requires_grad_() for x in (row_a, row_b))
    loss = kernels.kl_pair(a, b, direction=direction, temperature=temperature, impl=impl)  # type: ignore[arg-type]
    by_a, by_b = (x[0].double() for x in torch.autograd.grad(loss, (a, b)))
    weights = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "symmetric": (0.5, 0.5)}[direction]
    parts = [w * d for w, d in zip(weights, (edge.forward, edge.reverse), strict=True) if w]
    # log 2 comes from two logits of 0: no temperature changes it.
    torch.testing.assert_close(loss.item(), sum(parts), rtol=1e-6, atol=0, equal_nan=True)
    forward, reverse = exact_gradients(row_a, row_b, temperature), exact_gradients(row_b, row_a, temperature)
    for got, own, divergence, terms in (
        (by_a, weights[0], edge.forward, (forward[0], reverse[1])),
        (by_b, weights[1], edge.reverse, (forward[1], reverse[0])),
    ):
        if math.isnan(edge.forward) or (own and not math.isfinite(divergence)):
            assert not bool(got.isfinite().any())
        else:
            wanted = torch.stack([w * term for w, term in zip(weights, terms, strict=True) if w]).sum(0)
            torch.testing.assert_close(got, wanted, rtol=2**-7 if row_a.dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("classes", [4, 300])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_that_does_not_count_may_hold_anything(impl: str, classes: int, reduction: Any) -> None:
    spread = [rows_of(edge, classes, torch.float32) for edge in EDGE_ROWS]
    a, b = (torch.stack([row[side] for row in spread] + [torch.randn(classes)]).requires_grad_() for side in (0, 1))
    mask = torch.arange(len(a)) == len(a) - 1
    loss = kernels.kl_pair(a, b, mask=mask, reduction=reduction, impl=impl)
    by_a, by_b = torch.autograd.grad(loss.sum(), (a, b))
    torch.testing.assert_close(loss.sum(), plain(a[-1:], b[-1:]).detach(), rtol=1e-5, atol=0, check_dtype=False)
    for gradient in (by_a, by_b):
        assert not bool(gradient[:-1].any()) and bool(gradient[-1].any()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("classes", [5, 200])
def test_mean_over_nothing(impl: str, rows: int, classes: int) -> None:
    for empty in ("nan", "zero"):
        for mask in (torch.zeros(rows, dtype=torch.bool), None):
            if mask is None and rows:
                continue
            a, b = (torch.full((rows, classes), NAN, requires_grad=True) for _ in range(2))
            loss = kernels.kl_pair(a, b, mask=mask, reduction="mean", empty=empty, impl=impl)  # type: ignore[arg-type]
            loss.backward()
            assert bool(loss.isnan()) if empty == "nan" else float(loss.detach()) == 0.0
            assert a.grad is not None and b.grad is not None and not bool(a.grad.any() | b.grad.any())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_class_or_none_cannot_differ(impl: str) -> None:
    a, b = torch.randn(5, 1, requires_grad=True), torch.randn(5, 1, requires_grad=True)
    loss = kernels.kl_pair(a, b, impl=impl)
    assert float(loss.detach()) == 0 and not any(bool(g.any()) for g in torch.autograd.grad(loss, (a, b)))
    assert float(kernels.kl_pair(torch.randn(5, 0), torch.randn(5, 0))) == 0
    assert kernels.kl_pair(torch.randn(0, 7), torch.randn(0, 7), reduction="none", impl=impl).shape == (0,)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("classes", [2, 77, 3000])
def test_equal_logits_give_exactly_zero(impl: str, direction: Any, classes: int) -> None:
    # 17 short rows are more than a vector of them.
    a = torch.randn(17 if classes < 100 else 2, classes, generator=torch.Generator().manual_seed(classes)) * 5
    a[0, 0] = -INF
    a, b = a.clone().requires_grad_(), a.clone().requires_grad_()
    loss = kernels.kl_pair(a, b, direction=direction, temperature=1.7, reduction="none", impl=impl)
    assert not bool(loss.any())
    if impl != "reference":  # plain torch's backward of log_softmax rounds
        assert not any(bool(g.any()) for g in torch.autograd.grad(loss.sum(), (a, b)))


@pytest.mark.parametrize("classes", [3, 77, 1000, 2500])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "reference"])
def test_nearly_equal_logits_keep_the_relative_precision(impl: str, noise: float, direction: Any, classes: int) -> None:
    """In float32 plain torch has errors of 100% below a noise of 1e-4.

    A loss is a sum of terms without cancellation, each with the relative errors of p (the exponent's, here up to
    20 eps at p = e^-20, where it does not count; some 8 eps) and of u (2 eps, twice): 16 eps with the sums'. A gradient
    is p (v - mean) and q - p: the first has besides its own relative error those of v and the mean, p times eps times
    the largest v, as both are about 0 at a class that has nearly all of p.
    """
    generator = torch.Generator().manual_seed(classes)
    a = torch.randn(3, classes, generator=generator) * 3
    # Within a factor 2 of each other, so that the difference is exact: else its rounding is the noise's own.
    b = a * (1 + noise * torch.rand(a.shape, generator=generator))
    eps = torch.finfo(torch.float32).eps
    for isa in (ISAS or ["-"]) if impl == "cpu" else [None]:
        before = isa and kernels.set_isa(isa)
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss = kernels.kl_pair(x, y, direction=direction, reduction="none", impl=impl)
        gradients = torch.autograd.grad(loss.sum(), (x, y))
        if before:
            kernels.set_isa(before)
        wide_a, wide_b = a.double(), b.double()
        p, q = torch.softmax(wide_a, -1), torch.softmax(wide_b, -1)
        # Not from log p - log q, which is exact to 1e-16 only: from the difference of the logits, as derived.
        u = (wide_a - wide_b) + torch.log1p((p * torch.expm1(wide_b - wide_a)).sum(-1, keepdim=True))
        divergences = p * (u + torch.expm1(-u)), q * (-u + torch.expm1(u))
        weights = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "symmetric": (0.5, 0.5)}[direction]
        exact = sum(w * d.sum(-1) for w, d in zip(weights, divergences, strict=True))
        assert bool(((loss - exact).abs() <= 16 * eps * exact).all())
        forward = p * (u - (p * u).sum(-1, keepdim=True)), p * torch.expm1(-u)
        reverse = q * (-u + (q * u).sum(-1, keepdim=True)), q * torch.expm1(u)
        expected = (
            weights[0] * forward[0] + weights[1] * reverse[1],
            weights[0] * forward[1] + weights[1] * reverse[0],
        )
        for got, wanted in zip(gradients, expected, strict=True):
            largest = wanted.abs().amax(-1, keepdim=True)
            moved = u.abs().amax(-1, keepdim=True) * (p + q)
            assert bool(((got - wanted).abs() <= 4 * eps * (largest + moved)).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_inputs_are_never_changed_and_results_never_alias(impl: str, direction: Any) -> None:
    a, b = (torch.randn(6, 300, requires_grad=True) for _ in range(2))
    kept = a.detach().clone(), b.detach().clone()
    by_a, by_b = torch.autograd.grad(3 * kernels.kl_pair(a, b, direction=direction, impl=impl), (a, b))
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])
    assert len({x.data_ptr() for x in (a, b, by_a, by_b)}) == 4


@needs_native
@in_one_process
@pytest.mark.parametrize("classes", [10, 3000])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(classes: int) -> None:
    a, b = torch.randn(64, classes), torch.randn(64, classes)
    whole = kernels.kl_pair(a, b, reduction="none", impl="cpu")
    total = kernels.kl_pair(a, b, impl="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        alone = [kernels.kl_pair(x[None], y[None], reduction="none", impl="cpu") for x, y in zip(a, b, strict=True)]
        assert torch.equal(total, kernels.kl_pair(a, b, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, torch.cat(alone))


@in_one_process
def test_what_cannot_run_says_why() -> None:
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    for wrong in ((a[0], b[0]), (a, b[:2]), (a, b[:, :3])):
        with pytest.raises(ValueError, match="two tensors"):
            kernels.kl_pair(*wrong)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match="mask of bool"):
            kernels.kl_pair(a, b, mask=mask)
    for name, value in (("reduction", "avg"), ("direction", "both"), ("empty", "one"), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=name):
            kernels.kl_pair(a, b, **{name: value})
    if native.why_missing() is None:
        with pytest.raises(KernelUnavailable, match="two of one kind"):
            kernels.kl_pair(a, b.double(), impl="cpu")
        with pytest.raises(KernelUnavailable, match="float16"):
            kernels.kl_pair(a.half(), b.half(), impl="cpu")
    with pytest.raises(KernelUnavailable, match="cannot run as 'triton'"):
        kernels.kl_pair(a, b, impl="triton")


@in_one_process
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_dtypes_that_only_the_reference_takes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a, b = (torch.randn(3, 9).to(dtype).requires_grad_() for dtype in dtypes)
    loss = kernels.kl_pair(a, b)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad is not None and b.grad is not None and (a.grad.dtype, b.grad.dtype) == dtypes


@in_one_process
def test_the_module_is_the_function() -> None:
    a, b, mask = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) < 4
    options: dict[str, Any] = {"temperature": 2.0, "reduction": "mean", "direction": "reverse", "empty": "zero"}
    assert torch.equal(kernels.KLPairLoss(**options)(a, b, mask), kernels.kl_pair(a, b, mask=mask, **options))
