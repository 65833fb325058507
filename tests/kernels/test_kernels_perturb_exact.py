"""The perturbation step against the exact one: dtypes, shapes, layouts, options, and what cannot be computed."""

from __future__ import annotations

import pytest
import torch
from conftest import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from perturb_cases import Case, cases, check, wide

from hybridengine import kernels
from hybridengine.kernels import native

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
WIDTHS = [1, 3, 8, 19, 64, 150, 300]
IMPLS = ["reference"] if native.why_missing() else ["reference", "cpu"]
steps = cases(DTYPES, WIDTHS)


def check_on(case: Case, impl: str, isa: str) -> None:
    before = kernels.set_isa(isa) if ISAS else ""
    try:
        check(case, impl)
    finally:
        if ISAS:
            kernels.set_isa(before)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=500, deadline=None)
@given(case=steps, isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_exact_step(impl: str, case: Case, isa: str) -> None:
    check_on(case, impl, isa)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10_000, deadline=None)
@given(case=steps, isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_exact_step_often(impl: str, case: Case, isa: str) -> None:
    check_on(case, impl, isa)


@settings(max_examples=100, deadline=None)
@given(case=cases([torch.float16], WIDTHS))
def test_half_precision_by_the_reference(case: Case) -> None:
    check(case, "reference")


def eager(delta: torch.Tensor, gradient: torch.Tensor, epsilon: float | None, step_size: float) -> torch.Tensor:
    moved = delta + step_size * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    if epsilon is None:
        return moved
    return moved * (epsilon / moved.flatten(1).norm(dim=1).view(-1, 1, 1)).clamp(max=1.0)


@pytest.mark.skipif("cpu" not in IMPLS, reason="no native library")
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), epsilon=st.sampled_from([None, 0.3]), width=st.sampled_from([48, 333]))
def test_the_error_is_at_most_twice_torchs(seed: int, epsilon: float | None, width: int) -> None:
    """Over thousands of numbers, where errors average out: the root of the mean square against float64."""
    generator = torch.Generator().manual_seed(seed)
    delta, gradient = (torch.randn(2, 40, width, generator=generator) for _ in range(2))
    delta = delta / 100
    exact = eager(delta.double(), gradient.double(), epsilon, 0.5)
    ours = kernels.perturb_step(delta, gradient, torch.ones(2, 40), step_size=0.5, epsilon=epsilon, impl="cpu")
    torchs = eager(delta, gradient, epsilon, 0.5)
    errors = [(one.double() - exact).square().mean().sqrt() for one in (ours, torchs)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.skipif("cpu" not in IMPLS, reason="no native library")
@settings(max_examples=100, deadline=None)
@given(case=steps, data=st.data())
def test_a_token_gives_the_same_bits_anywhere(case: Case, data: st.DataObject) -> None:
    case.options["per"] = "token"
    whole = case.step("cpu")
    for name, one in whole.items():
        if one.numel() == 0:
            continue
        row, at = (data.draw(st.integers(0, size - 1)) for size in one.shape[:2])
        alone = kernels.perturb_step(
            case.delta[name][row : row + 1, at : at + 1],
            case.gradient[name][row : row + 1, at : at + 1],
            case.mask[name][row : row + 1, at : at + 1],
            **case.options,
        )
        assert torch.equal(alone[0, 0].nan_to_num(3), one[row, at].nan_to_num(3))


@pytest.mark.parametrize("impl", IMPLS)
def test_by_token_each_one_moves_by_the_step(impl: str) -> None:
    gradient, mask = torch.randn(3, 5, 40), torch.rand(3, 5) < 0.6
    moved = kernels.perturb_step(
        torch.zeros(3, 5, 40), gradient, mask, step_size=0.7, epsilon=0.5, per="token", impl=impl
    )
    torch.testing.assert_close(moved.norm(dim=2), 0.5 * mask)
    assert moved.shape == gradient.shape


@pytest.mark.skipif("cpu" not in IMPLS, reason="no native library")
def test_long_sums_and_cancelling_steps_stay_exact(isa: str) -> None:
    """The bound of the norm from three sums, where delta and step nearly cancel: it must then be summed anew."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(1, 64, 768, generator=generator)
    for part in (0.5, 0.999, 1.0, 1.0001, 2.0):
        delta = (-part * gradient / gradient.norm()).float()
        case = Case(
            {"a": delta}, {"a": gradient}, {"a": torch.ones(1, 64)},
            {"step_size": 1.0, "epsilon": 1e-4, "norm": "l2", "per": "sequence"},
        )  # fmt: skip
        result = case.step("cpu")["a"]
        z = wide(delta) + wide(gradient) / (wide(gradient) ** 2).sum() ** 0.5
        size = float((z**2).sum() ** 0.5)
        expected = min(size, 1e-4)
        # What is left when nearly all cancels carries the rounding of the delta that was given: 1e-7 of 1 in all.
        assert abs(float(result.double().norm()) - expected) <= 8e-7 * expected + 1e-8
        assert float(result.double().norm()) <= 1e-4 * (1 + 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1)])
def test_empty_and_smallest_shapes(impl: str, per: str, shape: tuple[int, int, int]) -> None:
    zeros = torch.zeros(shape)
    moved = kernels.perturb_step(
        zeros, zeros + 2, torch.ones(shape[:2]), step_size=1.0, epsilon=0.5, per=per, impl=impl  # type: ignore[call-overload]
    )  # fmt: skip
    assert moved.shape == shape and bool((moved == 0.5).all())


def test_an_unknown_choice_is_named() -> None:
    zeros = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="per must be"):
        kernels.perturb_step(zeros, zeros, torch.ones(1, 1), step_size=1.0, per="row")  # type: ignore[call-overload]
