"""Cross-entropy against float64 torch, over everything that changes a code path."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import native

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")

# Below and across a vector (16, 8, 4 lanes), a block (2048), several blocks; 1 and 2 are real heads.
CLASSES = [1, 2, 3, 7, 8, 16, 17, 77, 2047, 2048, 2049, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@dataclass
class Case:
    logits: Tensor
    target: Tensor
    options: dict[str, object]
    weight: Tensor | None

    def run(self, function: object, dtype: torch.dtype | None = None, **more: object) -> tuple[Tensor, Tensor]:
        """Return loss and gradient, both in float64, for an uneven incoming gradient."""
        logits = self.logits if dtype is None else self.logits.to(dtype)
        leaf = logits.detach().requires_grad_()
        weight = None if self.weight is None else self.weight.to(dtype or self.weight.dtype)
        loss = function(leaf, self.target, weight=weight, **self.options, **more)  # type: ignore[operator]
        incoming = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
        (gradient,) = torch.autograd.grad(loss, leaf, incoming)
        return loss.detach().double(), gradient.double()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, classes = draw(st.integers(1, 9)), draw(st.sampled_from(CLASSES))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.01, 1.0, 8.0]))
    values = (torch.randn(rows, classes + 3, generator=generator) * scale).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "strided", "transposed"]))
    if layout == "strided":
        logits = values[:, 1 : classes + 1]
    elif layout == "transposed":
        logits = values[:, :classes].t().contiguous().t()
    else:
        logits = values[:, :classes].contiguous()
    # One class, ignored, is the mean over nothing: it has its own test.
    ignore_index = draw(st.sampled_from([-100, 0, classes + 5] if classes > 1 else [-100, 6]))
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.3] = ignore_index
    if bool((target == ignore_index).all()):
        target[0] = classes - 1
    smoothing = draw(st.sampled_from([0.0, 0.1]))
    weight = None
    if smoothing == 0.0 and draw(st.booleans()):
        weight = (torch.rand(classes, generator=generator) + 0.5).to(dtype)
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    return Case(logits, target, options, weight)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).abs().max()) if value.numel() else 0.0


@settings(max_examples=40, deadline=None)
@given(case=cases(), isa=st.sampled_from(native.module().supported_isas() if native.why_missing() is None else ["-"]))
def test_not_further_from_float64_than_twice_torch(case: Case, isa: str) -> None:
    untouched = case.logits.clone()
    exact_loss, exact_gradient = case.run(F.cross_entropy, torch.float64)
    torch_loss, torch_gradient = case.run(F.cross_entropy)
    before = kernels.set_isa(isa)
    try:
        loss, gradient = case.run(kernels.cross_entropy, impl="cpu")
    finally:
        kernels.set_isa(before)
    assert torch.equal(case.logits, untouched)
    # Where torch happens to be exact, rounding is still allowed: half a unit in the last place of the result, and, as
    # both are differences of terms of this size, a few units of those terms. For float64 the "exact" side is no more
    # exact than the others: a smoothed loss sums V terms, and V eps is the bound of such a sum in any order. The
    # gradient is p = exp(x - lse) <= 1, whose relative error is the absolute one of x - lse: the terms' and the sum's.
    eps = torch.finfo(native.accumulator_dtype(case.logits.dtype)).eps
    classes, terms = case.logits.shape[1], float(case.logits.double().abs().max()) + 10
    gradient_terms = 4.0
    if case.logits.dtype == torch.float64:
        gradient_terms += float(exact_gradient.abs().max()) * (terms + classes)
        terms *= classes
    loss_ulp = eps * (float(exact_loss.abs().max()) + terms)
    gradient_ulp = torch.finfo(case.logits.dtype).eps * float(exact_gradient.abs().max()) + gradient_terms * eps
    assert error(loss, exact_loss) <= 2 * error(torch_loss, exact_loss) + loss_ulp
    assert error(gradient, exact_gradient) <= 2 * error(torch_gradient, exact_gradient) + gradient_ulp


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_reference_is_torch_in_float32(case: Case) -> None:
    wide = native.accumulator_dtype(case.logits.dtype)
    loss, gradient = case.run(kernels.cross_entropy, impl="reference")
    torch_loss, torch_gradient = case.run(F.cross_entropy, wide)
    assert torch.equal(loss, torch_loss)
    torch.testing.assert_close(gradient, torch_gradient.to(case.logits.dtype).double(), rtol=0, atol=0)


def test_dtypes_of_loss_and_gradient() -> None:
    for dtype, loss_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32)):
        for impl in (None, "reference"):
            logits = torch.randn(40, 5000).to(dtype).requires_grad_()
            loss = kernels.cross_entropy(logits, torch.arange(40), impl=impl)
            loss.backward()
            assert loss.dtype == loss_dtype
            assert logits.grad is not None and logits.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_the_edge_are_those_of_torch(isa: str, dtype: torch.dtype) -> None:
    classes = 2100
    logits = torch.randn(7, classes, dtype=dtype)
    logits[0, 5] = float("inf")
    logits[1, 5] = float("-inf")  # an ordinary row with an impossible class
    logits[2, :] = float("-inf")
    logits[3, 5] = float("nan")
    logits[4, :] = -1e30  # all equal and huge: the loss is log(classes), the gradient ordinary
    logits[5, :2048] = float("-inf")  # a whole block without a possible class
    target = torch.tensor([3, 5, 0, 1, 2, 2060, 4])
    ours, torchs = logits.clone().requires_grad_(), logits.clone().to(native.accumulator_dtype(dtype)).requires_grad_()
    loss = kernels.cross_entropy(ours, target, reduction="none", impl="cpu")
    expected = F.cross_entropy(torchs, target, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None and torchs.grad is not None
    torch.testing.assert_close(ours.grad, torchs.grad.to(dtype), equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ignored_row_may_hold_nan(isa: str, reduction: str) -> None:
    logits = torch.randn(3, 100)
    logits[1] = float("nan")
    logits.requires_grad_()
    target = torch.tensor([4, -100, 6])
    loss = kernels.cross_entropy(logits, target, reduction=reduction, impl="cpu")  # type: ignore[arg-type]
    loss.sum().backward()
    kept = F.cross_entropy(logits.detach()[[0, 2]], target[[0, 2]], reduction=reduction)
    torch.testing.assert_close(loss.sum(), kept.sum())
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and not bool(logits.grad[1].any())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("rows", [0, 3])
def test_mean_over_nothing(impl: str, rows: int) -> None:
    target = torch.full((rows,), -100)
    for empty in ("nan", "zero"):
        logits = torch.randn(rows, 9, requires_grad=True)
        loss = kernels.cross_entropy(logits, target, empty=empty, impl=impl)  # type: ignore[arg-type]
        loss.backward()
        assert bool(loss.isnan()) if empty == "nan" else float(loss.detach()) == 0.0
        assert logits.grad is not None and not bool(logits.grad.any())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_out_of_range_is_named(impl: str, label: int) -> None:
    with pytest.raises(IndexError, match=rf"target\[2\] = {label} is not one of the 5 classes"):
        kernels.cross_entropy(torch.randn(4, 5), torch.tensor([1, -100, label, 0]), impl=impl)


def test_wrong_arguments_are_named() -> None:
    logits, target = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    for arguments in ((logits[0], target), (logits, target[:2]), (logits, logits[:2])):
        with pytest.raises(ValueError, match="expected logits"):
            kernels.cross_entropy(*arguments)
    with pytest.raises(ValueError, match="reduction"):
        kernels.cross_entropy(logits, target, reduction="avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        kernels.cross_entropy(logits, target, empty="one")  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.sampled_from([-1e4, 1e4]))
def test_adding_a_constant_to_a_row_changes_nothing(seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/8, so that the shift itself is exact in float32.
    logits = torch.randint(-40, 40, (5, 300), generator=generator) / 8.0
    target = torch.randint(0, 300, (5,), generator=generator)
    plain = kernels.cross_entropy(logits, target, reduction="none", impl="cpu")
    assert torch.equal(kernels.cross_entropy(logits + shift, target, reduction="none", impl="cpu"), plain)


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads() -> None:
    logits, target = torch.randn(64, 3000), torch.randint(0, 3000, (64,))
    whole = kernels.cross_entropy(logits, target, reduction="none", impl="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat(
            [
                kernels.cross_entropy(x[None], t[None], reduction="none", impl="cpu")
                for x, t in zip(logits, target, strict=True)
            ]
        )
        mean = kernels.cross_entropy(logits, target, impl="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, alone)
    assert torch.equal(mean, kernels.cross_entropy(logits, target, impl="cpu"))


def test_the_module_is_the_function() -> None:
    logits, target, weight = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.rand(5)
    module = kernels.CrossEntropyLoss(weight, reduction="sum")
    assert torch.equal(module(logits, target), kernels.cross_entropy(logits, target, weight=weight, reduction="sum"))
