"""Moving many weights and back: the formulas of SAM, ASAM and AWP, exact restoration whatever happens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ISAS, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from perturb_cases import wide
from torch import Tensor

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import native

IMPLS = ["reference"] if native.why_missing() else ["reference", "cpu"]
RULES = ["sam", "asam", "awp"]
PAIRS = [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float64,) * 2]
SHAPES = [(), (0,), (1,), (7,), (16,), (33, 5), (64, 3), (2, 130)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def moves(draw: st.DrawFn, impl: str) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # The reference squares in float32.
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 1e15] if impl == "reference" else [0.0, 1e-35, 1e-6, 1.0, 1e30]))
    weights, gradients = [], []
    for _ in range(draw(st.integers(0, 5))):
        shape, (dtype, other) = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(PAIRS))
        weights.append((torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 0.1, 5.0]))).to(dtype))
        gradient = (torch.randn(shape, generator=generator) * scale).to(other)
        if draw(st.integers(0, 5)) == 0:
            gradient.zero_()
        if draw(st.integers(0, 9)) == 0 and gradient.numel():
            gradient.view(-1)[-1] = draw(st.sampled_from([math.nan, math.inf]))
        gradients.append(gradient.t().contiguous().t() if gradient.dim() == 2 and draw(st.booleans()) else gradient)
    rule, rho = draw(st.sampled_from(RULES)), draw(st.sampled_from([0.0, 1e-3, 0.05, 2.0]))
    return weights, gradients, {"rule": rule, "rho": rho, "eta": draw(st.sampled_from([0.0, 0.01, 1.0]))}


def exact_offsets(weights: list[Tensor], gradients: list[Tensor], rule: str, rho: float, eta: float) -> Any:
    """The norm and what each weight moves by, in extended precision; None for a weight that stays."""
    w, g = [wide(one) for one in weights], [wide(one) for one in gradients]
    s = [np.abs(one) + np.longdouble(eta) if rule == "asam" else np.ones_like(one) for one in w]
    squares = [np.sum((size * one) ** 2) for size, one in zip(s, g, strict=True)]
    norm = np.sqrt(sum(squares, np.longdouble(0)))
    offsets = []
    for one, size, gradient, own in zip(w, s, g, squares, strict=True):
        length = np.sqrt(own) if rule == "awp" else norm
        radius = rho * np.sqrt(np.sum(one**2)) if rule == "awp" else np.longdouble(rho)
        usable = np.isfinite(length) and length > 0
        offsets.append(radius * size**2 * gradient / length if usable else None)
    return norm, offsets


def check(case: Any, impl: str, isa: str) -> None:
    """Where the weights are while moved, and that every bit is back afterwards.

    The native kernel computes in float64 and rounds once. The reference takes norms in float32, whose sums of hundreds
    of terms are off by some 50 eps at worst, and rounds the factors and the sum to float32 too, before the dtype.
    Beside float32 weights, float64 ones feel the eps of float32 in the common norm.
    """
    weights, gradients, options = case
    widest = max((torch.finfo(native.accumulator_dtype(w.dtype)).eps for w in weights), default=0.0)
    old, given_gradients = [w.clone() for w in weights], [g.clone() for g in gradients]
    norm, offsets = exact_offsets(weights, gradients, **options)
    before = kernels.set_isa(isa) if ISAS else ""
    try:
        with kernels.perturb_weights(weights, gradients, **options, impl=impl) as moved:
            assert moved.usable == any(one is not None for one in offsets)
            added = 0.0
            for w, was, offset in zip(weights, old, offsets, strict=True):
                if offset is None:
                    assert torch.equal(bits(w), bits(was))
                    continue
                eps = torch.finfo(native.accumulator_dtype(w.dtype)).eps
                error = 64 * widest * np.abs(offset) + eps * np.abs(wide(was)) if impl == "reference" else 1e-15
                bound = torch.finfo(w.dtype).eps / 2 * np.abs(wide(was) + offset) * (1 + 1e-9) + error
                off = np.abs(wide(w) - (wide(was) + offset))
                assert (off <= bound + 1e-15 * np.abs(offset) + 1e-40).all()
                added += float(((wide(w) - wide(was)) ** 2).sum())
            if np.isfinite(norm):
                assert moved.norm == pytest.approx(float(norm), rel=1e-5 if impl == "reference" else 1e-9)
            assert moved.distance() == pytest.approx(math.sqrt(added), rel=1e-4 if impl == "reference" else 1e-9)
    finally:
        if ISAS:
            kernels.set_isa(before)
    for now, was in zip([*weights, *gradients], [*old, *given_gradients], strict=True):
        assert torch.equal(bits(now), bits(was))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=500, deadline=None)
@given(data=st.data(), isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_formula_and_back(impl: str, data: st.DataObject, isa: str) -> None:
    check(data.draw(moves(impl)), impl, isa)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10_000, deadline=None)
@given(data=st.data(), isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_formula_and_back_often(impl: str, data: st.DataObject, isa: str) -> None:
    check(data.draw(moves(impl)), impl, isa)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_every_bit_comes_back_after_an_exception(impl: str, rule: Any) -> None:
    """Of any numbers, among them signed zeros, subnormals and NaN with a payload; over several chunks."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(70_001,), (3, 65_536), (5,)]
    weights = [torch.randint(-(2**31), 2**31 - 1, s, generator=generator, dtype=torch.int32) for s in shapes]
    weights = [one.view(torch.float32) for one in weights]
    if rule != "sam":  # measured at the weights, which must then be finite
        weights = [one.nan_to_num(0, 0, 0).clamp(-1e3, 1e3) for one in weights]
    weights[2] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3e38 if rule == "sam" else 3.0])
    old = [w.clone() for w in weights]
    gradients = [torch.randn(w.shape, generator=generator) for w in weights]
    with (
        pytest.raises(KeyError),
        kernels.perturb_weights(weights, gradients, rho=0.5, rule=rule, impl=impl) as moved,
    ):
        assert moved.usable and not torch.equal(bits(weights[0]), bits(old[0]))
        weights[0].fill_(3.0)  # an optimizer's step inside
        raise KeyError
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights, old, strict=True))
    weights[0].zero_()
    moved.restore()
    assert not bool(weights[0].any()), "restored once only"


@needs_native
@pytest.mark.parametrize("rule", RULES)
def test_the_bits_do_not_depend_on_threads(rule: Any, isa: str) -> None:
    weights, gradients = ([torch.randn(s) for s in [(300_007,), (64, 64), (9,)]] for _ in range(2))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        with kernels.perturb_weights(weights, gradients, rho=0.1, rule=rule, impl="cpu") as moved:
            results.append([*(w.clone() for w in weights), torch.tensor([moved.norm, moved.distance()])])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd_notices_the_move(impl: str) -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    loss = (weight * weight).sum()
    with kernels.perturb_weights([weight], [torch.ones(4, 4)], rho=0.1, impl=impl):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert weight.requires_grad and weight.is_leaf


def test_what_cannot_run_natively_runs_by_the_reference() -> None:
    base = torch.randn(40)
    for weights in (
        [base[:20], base[10:30]],  # overlap: saved and moved in one pass, the second would save moved numbers
        [base, base],
        [torch.randn(6, 4).t()],
        [torch.randn(5).half()],
    ):
        old = [w.clone() for w in weights]
        gradients = [torch.randn(w.shape).to(w.dtype) for w in weights]
        with kernels.perturb_weights(weights, gradients, rho=0.5):
            assert not torch.equal(weights[0], old[0])
        assert all(torch.equal(a, b) for a, b in zip(weights, old, strict=True))
        if "cpu" in IMPLS:
            with pytest.raises(KernelUnavailable, match=r"share memory|contiguous|float16"):
                kernels.perturb_weights(weights, gradients, rho=0.5, impl="cpu")


def test_wrong_arguments_are_named() -> None:
    one = [torch.ones(3)]
    with pytest.raises(ValueError, match="rule must be"):
        kernels.perturb_weights(one, one, rho=1.0, rule="gsam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="negative"):
        kernels.perturb_weights(one, one, rho=math.nan)
    for other, message in (([], "1 and 0"), ([torch.ones(4)], r"\(3,\) and \(4,\) at 0")):
        with pytest.raises(ValueError, match=message):
            kernels.perturb_weights(one, other, rho=1.0)
    assert not kernels.perturb_weights([], [], rho=1.0).usable


# ---- keep ----------------------------------------------------------------------------------------------------------

KEPT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64]


@st.composite
def kept(draw: st.DrawFn) -> list[Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = []
    for _ in range(draw(st.integers(0, 5))):
        dtype, size = draw(st.sampled_from(KEPT_DTYPES)), draw(st.sampled_from([0, 1, 3, 64, 1001, 40_000]))
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size + 1,), generator=generator, dtype=torch.uint8)
        raw = raw.repeat_interleave(dtype.itemsize).roll(1)  # any bits, and NaN with a payload among them
        tensors.append(raw.view(dtype)[draw(st.integers(0, 1)) :] if dtype != torch.bool else raw.bool()[1:])
    return tensors


def check_kept(tensors: list[Tensor], impl: str, isa: str) -> None:
    old = [bits(one).clone() for one in tensors]
    before = kernels.set_isa(isa) if ISAS else ""
    try:
        with kernels.keep(tensors, impl=impl), kernels.keep(tensors[:1], impl=impl):
            for one in tensors:
                one.zero_()
    finally:
        if ISAS:
            kernels.set_isa(before)
    assert all(torch.equal(bits(a), b) for a, b in zip(tensors, old, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=500, deadline=None)
@given(tensors=kept(), isa=st.sampled_from(ISAS or ["-"]))
def test_any_bits_come_back(impl: str, tensors: list[Tensor], isa: str) -> None:
    check_kept(tensors, impl, isa)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10_000, deadline=None)
@given(tensors=kept(), isa=st.sampled_from(ISAS or ["-"]))
def test_any_bits_come_back_often(impl: str, tensors: list[Tensor], isa: str) -> None:
    check_kept(tensors, impl, isa)


@pytest.mark.parametrize("impl", IMPLS)
def test_kept_tensors_may_share_memory_and_an_exception_restores(impl: str) -> None:
    base = torch.randn(100)
    old = base.clone()
    with pytest.raises(KeyError), kernels.keep([base, base[10:]], impl=impl):
        base.fill_(1)
        raise KeyError
    assert torch.equal(base, old)
