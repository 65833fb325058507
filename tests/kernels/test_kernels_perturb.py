"""The perturbation step: what every attack relies on, for both implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import native

IMPLS = ["reference"] if native.why_missing() else ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@dataclass
class Batch:
    delta: dict[str, Tensor]
    gradient: dict[str, Tensor]
    mask: dict[str, Tensor]

    def step(self, **options: Any) -> dict[str, Tensor]:
        return kernels.perturb_step(self.delta, self.gradient, self.mask, **options)

    def map(self, change: Any) -> Batch:
        return Batch(
            *({name: change(t) for name, t in part.items()} for part in (self.delta, self.gradient, self.mask))
        )


def norms(sites: dict[str, Tensor]) -> Tensor:
    """The L2 norm of each sequence over all sites, in float64."""
    return torch.stack([one.double().flatten(1).square().sum(1) for one in sites.values()]).sum(0).sqrt()


def slack(dtype: torch.dtype) -> float:
    """Relative error that rounding each element to `dtype` can cause in a norm, plus that of float32 arithmetic.

    Every element is off by at most eps/2 of itself, hence so is the norm; a bound that was met exactly before may be
    exceeded by that much. The reference sums squares in float32: a few eps more there.
    """
    return torch.finfo(dtype).eps / 2 + 8 * torch.finfo(native.accumulator_dtype(dtype)).eps


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype, start: float = 0.3) -> Batch:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.integers(1, 4))
    scale = draw(st.sampled_from([1e-30, 1.0, 1e30]))  # squares of these leave float32
    batch = Batch({}, {}, {})
    for name in draw(st.sampled_from([["words"], ["words", "types"], ["encoder", "decoder", "prompt"]])):
        length, width = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 8, 19]))
        keep = torch.rand(size, length, generator=generator) < 0.7
        keep[:, 0] = True
        batch.mask[name] = keep
        shape = (size, length, width)
        batch.delta[name] = (torch.randn(shape, generator=generator) * start * keep[..., None]).to(dtype)
        batch.gradient[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return batch


steps = st.fixed_dictionaries(
    {
        "step_size": st.sampled_from([0.0, 0.1, 1.0]),
        "epsilon": st.sampled_from([None, 0.25, 5.0]),
        "norm": st.sampled_from(["l2", "linf"]),
    }
)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), options=steps, dtype=st.sampled_from(DTYPES))
def test_invariants(impl: str, data: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    batch = data.draw(batches(dtype))
    before = batch.map(torch.clone)
    result = batch.step(**options, impl=impl)
    for name, one in result.items():
        assert one.dtype == dtype and one.shape == batch.delta[name].shape and not one.requires_grad
        assert not bool(one[~batch.mask[name]].any()), "padding is exactly zero"
        assert bool(one.isfinite().all())
        for was, now in ((before.delta, batch.delta), (before.gradient, batch.gradient)):
            assert torch.equal(was[name], now[name])
    epsilon = options["epsilon"]
    if epsilon is not None and options["norm"] == "l2":
        assert bool((norms(result) <= epsilon * (1 + slack(dtype))).all())
    if epsilon is not None and options["norm"] == "linf":
        assert all(float(one.abs().max()) <= epsilon * (1 + slack(dtype)) for one in result.values())


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_the_first_step_has_the_wanted_norm_whatever_the_scale(impl: str, data: Any, dtype: torch.dtype) -> None:
    batch = data.draw(batches(dtype, start=0.0))
    size = norms(batch.step(step_size=0.7, impl=impl))
    torch.testing.assert_close(size, torch.full_like(size, 0.7), rtol=2 * slack(dtype), atol=0)
    doubled = Batch(batch.delta, {name: 2 * one for name, one in batch.gradient.items()}, batch.mask)
    result, scaled = batch.step(step_size=0.7, impl=impl), doubled.step(step_size=0.7, impl=impl)
    # A loss scale of a power of two changes nothing. Natively, a rate beyond 1e-30 to 1e30 is computed in double, where
    # rate, product and result are rounded once, against three times in float: 1.5 eps; or at the subnormal numbers.
    info = torch.finfo(dtype)
    allowed = {"rtol": 2 * info.eps, "atol": info.smallest_normal} if impl == "cpu" else {"rtol": 0, "atol": 0}
    for one, other in zip(result.values(), scaled.values(), strict=True):
        torch.testing.assert_close(one, other, **allowed)


@pytest.mark.skipif("cpu" not in IMPLS, reason="no native library")
@settings(max_examples=15, deadline=None)
@given(data=st.data(), options=steps, dtype=st.sampled_from(DTYPES), isa=st.sampled_from(["baseline", "best"]))
def test_native_is_the_reference(data: Any, options: dict[str, Any], dtype: torch.dtype, isa: str) -> None:
    batch = data.draw(batches(dtype))
    before = kernels.set_isa("baseline" if isa == "baseline" else native.module().supported_isas()[-1])
    try:
        result = batch.step(**options, impl="cpu")
    finally:
        kernels.set_isa(before)
    expected = batch.step(**options, impl="reference")
    # Both round once to the same dtype from values that differ in the accumulator's last bits: at most one unit apart.
    eps = torch.finfo(dtype).eps + 16 * torch.finfo(native.accumulator_dtype(dtype)).eps
    for one, other in zip(result.values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=eps, atol=4 * torch.finfo(native.accumulator_dtype(dtype)).eps)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), options=steps, dtype=st.sampled_from(DTYPES))
def test_a_sequence_depends_on_nothing_but_itself(impl: str, data: Any, options: Any, dtype: torch.dtype) -> None:
    batch = data.draw(batches(dtype))
    whole = batch.step(**options, impl=impl)

    def padded(tensor: Tensor) -> Tensor:
        extra = torch.full_like(tensor[:, :1], float("nan") if tensor.is_floating_point() else 0)
        return torch.cat([tensor, extra, extra], 1)

    longer = batch.map(padded).step(**options, impl=impl)
    for row in range(len(next(iter(whole.values())))):
        alone = batch.map(lambda t, row=row: t[row : row + 1]).step(**options, impl=impl)
        for name, one in whole.items():
            # The native kernel sums in a fixed order; torch's sums may group differently.
            for other in (alone[name][0], longer[name][row, : one.shape[1]]):
                if impl == "cpu":
                    assert torch.equal(one[row], other)
                else:
                    torch.testing.assert_close(one[row], other, rtol=2 * slack(dtype), atol=slack(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_sequences_without_a_usable_gradient(impl: str, norm: Any) -> None:
    delta, gradient = torch.full((5, 3, 4), 0.1), torch.randn(5, 3, 4)
    mask = torch.ones(5, 3)
    mask[4, 2] = 0
    delta[4, 2] = 0
    gradient[0] = 0
    gradient[1, 0, 0] = float("nan")
    gradient[2, 2, 3] = float("-inf")
    gradient[4, 2, 0] = float("nan")  # masked: does not count
    result = kernels.perturb_step(delta, gradient, mask, step_size=1.0, epsilon=None, norm=norm, impl=impl)
    assert torch.equal(result[:3], delta[:3])
    assert bool((result[3] != delta[3]).any()) and bool((result[4, :2] != delta[4, :2]).any())
    kept = kernels.perturb_step(delta, gradient, mask, step_size=1.0, epsilon=0.01, norm=norm, impl=impl)
    assert torch.equal(kept[1:3], delta[1:3]), "not even projected"


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_are_joint_over_sites(impl: str) -> None:
    mask = torch.ones(1, 1)
    gradient = {"a": torch.tensor([[[3.0]]]), "b": torch.tensor([[[0.0, 4.0]]])}
    delta = {name: torch.zeros_like(one) for name, one in gradient.items()}
    result = kernels.perturb_step(delta, gradient, dict.fromkeys(delta, mask), step_size=1.0, impl=impl)
    torch.testing.assert_close(result["a"], torch.tensor([[[0.6]]]))
    torch.testing.assert_close(result["b"], torch.tensor([[[0.0, 0.8]]]))


def test_half_precision_does_not_overflow() -> None:
    gradient = torch.full((1, 4, 64), 6e4, dtype=torch.float16)
    result = kernels.perturb_step(torch.zeros_like(gradient), gradient, torch.ones(1, 4), step_size=1.0)
    torch.testing.assert_close(result.float().norm(), torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e200, 1e308])
def test_float64_gradients_of_any_size(impl: str, size: float) -> None:
    gradient = torch.full((1, 2, 8), size, dtype=torch.float64)
    result = kernels.perturb_step(torch.zeros_like(gradient), gradient, torch.ones(1, 2), step_size=1.0, impl=impl)
    torch.testing.assert_close(result, torch.full_like(result, 0.25))


def test_layouts_and_graphs_are_left_alone() -> None:
    gradient = torch.randn(3, 8, 4).transpose(1, 2).requires_grad_()
    delta = torch.zeros(3, 4, 8, requires_grad=True)
    result = kernels.perturb_step(delta, gradient, torch.ones(3, 4, dtype=torch.int64), step_size=1.0)
    assert not result.requires_grad
    torch.testing.assert_close(result.flatten(1).norm(dim=1), torch.ones(3))


def test_wrong_arguments_are_named() -> None:
    delta, mask = torch.zeros(2, 3, 4), torch.ones(2, 3)
    for gradient, positions in ((torch.zeros(2, 3), mask), (delta, torch.ones(3, 2))):
        with pytest.raises(ValueError, match="expected delta and gradient"):
            kernels.perturb_step(delta, gradient, positions, step_size=1.0)
    for options in ({"step_size": -1.0}, {"step_size": 1.0, "epsilon": float("nan")}):
        with pytest.raises(ValueError, match="negative"):
            kernels.perturb_step(delta, delta, mask, **options)
    with pytest.raises(ValueError, match="norm"):
        kernels.perturb_step(delta, delta, mask, step_size=1.0, norm="l1")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="sites differ"):
        kernels.perturb_step({"a": delta}, {"b": delta}, {"a": mask}, step_size=1.0)
    with pytest.raises(ValueError, match="different sizes"):
        both, masks = {"a": delta, "b": delta[:1]}, {"a": mask, "b": mask[:1]}
        kernels.perturb_step(both, both, masks, step_size=1.0)
    assert kernels.perturb_step({}, {}, {}, step_size=1.0) == {}
