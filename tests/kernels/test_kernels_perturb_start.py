"""The random start of attacks: its formula, its ball, its mask, and the arithmetic that methods used to write out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from perturb_cases import laid_out
from torch import Tensor

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import native

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
IMPLS = ["reference"] if native.why_missing() else ["reference", "cpu"]


@st.composite
def starts(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, size = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 4))
    uniform, mask = {}, {}
    for name in draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]])):
        shape = (size, draw(st.integers(0, 6)), draw(st.sampled_from([1, 3, 8, 19, 64, 150])))
        draws = torch.rand(shape, generator=generator)
        mask[name] = torch.rand(shape[:2], generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
        layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
        if layout != "expanded":
            draws = draws.masked_fill(~mask[name][..., None], float("nan"))  # whatever was drawn there
        uniform[name] = laid_out(draws.to(dtype), layout)
    options = {
        "epsilon": draw(st.sampled_from([0.0, 1e-3, 0.3, 7.0])),
        "norm": draw(st.sampled_from(["l2", "linf"])),
        "per": draw(st.sampled_from(["sequence", "token"])),
    }
    return uniform, mask, options


def check(case: Any, impl: str, isa: str) -> None:
    """Every number against the formula in float64, and the ball."""
    uniform, mask, options = case
    before = kernels.set_isa(isa) if ISAS else ""
    try:
        result = kernels.perturb_start(uniform, mask, **options, impl=impl)
    finally:
        if ISAS:
            kernels.set_isa(before)
    count = sum(m.sum(1) * uniform[name].shape[2] for name, m in mask.items())
    total = torch.zeros(len(next(iter(mask.values()))), dtype=torch.float64)
    for name, one in result.items():
        dtype, by_token = one.dtype, options["per"] == "token"
        eps = torch.finfo(native.accumulator_dtype(dtype)).eps
        n = torch.full(one.shape[:2], one.shape[2]) if by_token else count.view(-1, 1).expand(one.shape[:2])
        n = n.clamp_min(1).double() if options["norm"] == "l2" else torch.ones(one.shape[:2], dtype=torch.float64)
        exact = (2 * uniform[name].double() - 1) * options["epsilon"] / n.sqrt().unsqueeze(-1)
        exact = exact.masked_fill(~mask[name][..., None], 0)
        # Root, reciprocal and two products round to eps/2 each, torch's root to an eps or so; then the result's dtype.
        bound = (3 * eps + torch.finfo(dtype).eps / 2) * exact.abs() + 1e-300
        assert one.dtype == dtype and one.shape == uniform[name].shape and not one.requires_grad
        assert not bool(one[~mask[name]].any()), "masked positions are zero"
        assert bool(((one.double() - exact).abs() <= bound).all())
        slack = 1 + 4 * eps + torch.finfo(dtype).eps / 2
        if options["norm"] == "linf" or by_token:
            sizes = (
                one.double().abs().amax(2) if options["norm"] == "linf" and one.numel() else one.double().norm(dim=2)
            )
            assert bool((sizes <= options["epsilon"] * slack).all())
        total += one.double().square().sum((1, 2))
    if options["norm"] == "l2" and options["per"] == "sequence":
        assert bool((total.sqrt() <= options["epsilon"] * (1 + 1e-6 + torch.finfo(dtype).eps / 2)).all())


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=500, deadline=None)
@given(case=starts(), isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_formula(impl: str, case: Any, isa: str) -> None:
    check(case, impl, isa)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10_000, deadline=None)
@given(case=starts(), isa=st.sampled_from(ISAS or ["-"]))
def test_it_is_the_formula_often(impl: str, case: Any, isa: str) -> None:
    check(case, impl, isa)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 40))
def test_it_is_what_methods_wrote_out(seed: int, size: int) -> None:
    """FreeLB's start as it was written in the method: to the bit by the reference, natively but for torch's root."""
    generator = torch.Generator().manual_seed(seed)
    uniform = {name: torch.rand(size, 5, width, generator=generator) for name, width in (("a", 32), ("b", 7))}
    mask = {name: torch.rand(size, 5, generator=generator) < 0.7 for name in uniform}
    floats = {name: one.to(torch.float32) for name, one in mask.items()}
    counts = [floats[name].sum(1) * one.shape[-1] for name, one in uniform.items()]
    scale = 0.3 / sum(counts[1:], counts[0]).clamp_min(1).sqrt()
    for impl in IMPLS:
        made = kernels.perturb_start(uniform, mask, epsilon=0.3, impl=impl)
        for name, one in uniform.items():
            written = (2 * one - 1) * floats[name].unsqueeze(-1) * scale.view(-1, 1, 1)
            if impl == "reference":
                assert torch.equal(made[name], written)
            else:  # torch's vectors may round the root of float32 to the wrong side: one unit of each factor after it
                torch.testing.assert_close(made[name], written, rtol=3 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.skipif("cpu" not in IMPLS, reason="no native library")
def test_the_bits_are_those_of_any_instruction_set_batch_and_padding() -> None:
    uniform, mask = torch.rand(5, 7, 50), torch.rand(5, 7) < 0.6
    made = []
    for isa in ISAS:
        before = kernels.set_isa(isa)
        made.append(kernels.perturb_start(uniform, mask, epsilon=0.3, impl="cpu"))
        kernels.set_isa(before)
    assert all(torch.equal(made[0], one) for one in made)
    longer = torch.cat([uniform, torch.rand(5, 2, 50)], 1), torch.cat([mask, torch.zeros(5, 2, dtype=torch.bool)], 1)
    assert torch.equal(kernels.perturb_start(*longer, epsilon=0.3, impl="cpu")[:, :7], made[0])
    assert torch.equal(kernels.perturb_start(uniform[2:3], mask[2:3], epsilon=0.3, impl="cpu"), made[0][2:3])


def test_wrong_arguments_are_named() -> None:
    uniform, mask = torch.rand(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="expected uniform"):
        kernels.perturb_start(uniform, mask[:1], epsilon=1.0)
    with pytest.raises(ValueError, match="negative"):
        kernels.perturb_start(uniform, mask, epsilon=float("nan"))
    with pytest.raises(ValueError, match="norm must be"):
        kernels.perturb_start(uniform, mask, epsilon=1.0, norm="l1")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="sites differ"):
        kernels.perturb_start({"a": uniform}, {"b": mask}, epsilon=1.0)
    with pytest.raises(ValueError, match="different sizes"):
        kernels.perturb_start({"a": uniform, "b": uniform[:1]}, {"a": mask, "b": mask[:1]}, epsilon=1.0)
    assert kernels.perturb_start({}, {}, epsilon=1.0) == {}
    halves = kernels.perturb_start(uniform.half(), mask, epsilon=1.0)
    assert halves.dtype == torch.float16 and bool(halves.isfinite().all())
    if "cpu" in IMPLS:
        with pytest.raises(KernelUnavailable, match="float16"):
            kernels.perturb_start(uniform.half(), mask, epsilon=1.0, impl="cpu")
