"""Cross-entropy against float64 torch, over everything that changes a code path."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, Problem, assert_as_good_as_torch, problems

from hybridengine import kernels
from hybridengine.kernels import native

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")

ISAS = native.module().supported_isas() if native.why_missing() is None else ["-"]


def check_on(isa: str, problem: Problem) -> None:
    untouched = problem.logits.clone()
    before = kernels.set_isa(isa)
    try:
        function = partial(kernels.cross_entropy, return_lse=True, impl="cpu")
        outcome = problem.outcome(function, problem.logits.dtype)
        assert_as_good_as_torch(problem, outcome)
        # Without the lse the gradient is made in the forward pass; the same arithmetic, the same bits.
        if not problem.use_lse:
            without = problem.outcome(
                lambda *args, **options: (kernels.cross_entropy(*args, impl="cpu", **options), torch.zeros(1)),
                problem.logits.dtype,
            )
            assert torch.equal(without[0], outcome[0])
            assert_as_good_as_torch(problem, (outcome[0], outcome[1], without[2]))
    finally:
        kernels.set_isa(before)
    assert torch.equal(problem.logits, untouched)


@settings(max_examples=500, deadline=None)
@given(problem=problems(), isa=st.sampled_from(ISAS))
def test_not_further_from_float64_than_twice_torch(problem: Problem, isa: str) -> None:
    check_on(isa, problem)


@pytest.mark.long
@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(problem=problems(), isa=st.sampled_from(ISAS))
def test_not_further_from_float64_than_twice_torch_at_length(problem: Problem, isa: str) -> None:
    check_on(isa, problem)


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_the_reference_follows_its_formula(problem: Problem) -> None:
    function = partial(kernels.cross_entropy, return_lse=True, impl="reference")
    assert_as_good_as_torch(problem, problem.outcome(function, problem.logits.dtype))


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


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_an_impossible_class_without_weight_adds_nothing(impl: str, softcap: float | None) -> None:
    """A masked class (-inf) with probability 0: no NaN, in the loss or anywhere in the gradient."""
    logits = torch.randn(3, 2100)
    logits[:, 7] = float("-inf")
    target = torch.softmax(logits + torch.randn(3, 2100), -1)
    options = {"weight": torch.ones(2100).index_fill(0, torch.tensor([7]), 0.0), "label_smoothing": 0.1}
    without = [one for one in range(2100) if one != 7]
    for extra in ({}, options):
        leaf = logits.clone().requires_grad_()
        loss = kernels.cross_entropy(leaf, target, impl=impl, **extra)  # type: ignore[call-overload]
        loss.backward()
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and not bool(leaf.grad[:, 7].any())
    assert float(loss.detach()) > 0
    plain = kernels.cross_entropy(logits, target, softcap=softcap, impl=impl)
    if softcap is None:
        torch.testing.assert_close(plain, F.cross_entropy(logits[:, without], target[:, without]))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_lse_of_edges(impl: str) -> None:
    inf = float("inf")
    logits = torch.tensor([[0.0, 1.0], [inf, 0.0], [-inf, -inf], [-1e30, -1e30], [float("nan"), 0.0], [5.0, 5.0]])
    target = torch.tensor([0, 0, 0, 0, -100, -100])
    leaf = logits.clone().requires_grad_()
    _, lse = kernels.cross_entropy(leaf, target, reduction="none", return_lse=True, impl=impl)
    expected = torch.logsumexp(logits, -1)
    assert lse[1].isnan() or lse[1] == inf  # a softmax of infinity is NaN; either way the loss says so
    torch.testing.assert_close(lse[[0, 3]], expected[[0, 3]])
    assert lse[4:].tolist() == [0.0, 0.0]
    lse[[0, 3, 4, 5]].sum().backward()
    assert leaf.grad is not None and not bool(leaf.grad[4:].any())
    torch.testing.assert_close(leaf.grad[[0, 3]], torch.softmax(logits[[0, 3]], -1))


@pytest.mark.parametrize("impl", ["cpu", "reference", None])
def test_labels_without_weight_give_no_gradient(impl: str | None) -> None:
    weight = torch.tensor([1.0, 0.0, 1.0])
    for empty in ("nan", "zero"):
        logits = torch.randn(4, 3, requires_grad=True)
        loss = kernels.cross_entropy(logits, torch.ones(4, dtype=torch.int64), weight=weight, empty=empty, impl=impl)  # type: ignore[call-overload]
        loss.backward()
        assert bool(loss.isnan()) if empty == "nan" else float(loss.detach()) == 0.0
        assert logits.grad is not None and not bool(logits.grad.any())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_targets_that_sum_to_nothing_are_targets(impl: str) -> None:
    logits, target = torch.randn(1, 5, requires_grad=True), torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]])
    loss = kernels.cross_entropy(logits, target, impl=impl)
    loss.backward()
    torch.testing.assert_close(loss.detach(), (logits[0, 1] - logits[0, 0]).detach())
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, -target)


def test_a_parameter_is_never_overwritten_through_a_view() -> None:
    parameter = torch.randn(8000, requires_grad=True)
    kept = parameter.detach().clone()
    kernels.cross_entropy(parameter.view(8, 1000), torch.arange(8), inplace=True, impl="cpu").backward()
    assert torch.equal(parameter.detach(), kept)


def test_a_confident_label_keeps_its_gradient(isa: str) -> None:
    """At a probability of 0.9999 the label's p - 1 is right to 0.5%, and so are the other classes' shares."""
    logits = torch.zeros(2, 30000)
    logits[:, 100] = float(torch.tensor(9999.0 * 29999).log())
    leaf = logits.clone().requires_grad_()
    kernels.cross_entropy(leaf, torch.tensor([100, 5]), impl="cpu").backward()
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, torch.tensor([100, 5])).backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0.005, atol=0)


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
