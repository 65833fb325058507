"""GELU: value and gradient against float64, second order against torch, and models that use the kernel unasked."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ISAS, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable

EPS = torch.finfo(torch.float32).eps
SUBNORMAL = 2.0**-149  # the step of the smallest float32: what rounding to one of them may cost
LARGE = (128, 512)  # elements enough for the kernel to pay

# Where the kernel changes its way (5.5 and 13.2, at which tails are cut), where squares or exponentials leave float32,
# and the ends of the number range.
EDGES = [0.0, 1e-45, 1e-38, 1e-20, 1e-3, 0.5, 1.0, 5.4999995, 5.5, 13.199999, 13.2, 13.3, 100.0, 1e19, 3.4e38]


def counted() -> int:
    return kernels.used().get("gelu", {}).get("cpu", 0)


def with_gradient(x: Tensor, incoming: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = kernels.gelu(leaf, impl=impl)
    return out.detach(), torch.autograd.grad(out, leaf, incoming)[0]


def assert_within_the_bounds(x: Tensor, incoming: Tensor) -> None:
    """Value and gradient against torch in float64, whose own error, some 1e-16 of |x| and of |incoming|, is nothing."""
    value, gradient = with_gradient(x, incoming, "cpu")
    exact, exact_gradient = with_gradient(x.double(), incoming.double(), "reference")
    # The bounds are derived in csrc/gelu/gelu.inl; its measured errors are two thirds of them at most.
    assert bool(((value - exact).abs() <= 2 * EPS * x.abs().double() + SUBNORMAL).all())
    assert bool(((gradient - exact_gradient).abs() <= 3 * EPS * incoming.abs().double() + SUBNORMAL).all())


@needs_native
@settings(max_examples=100, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["-"]),
    count=st.one_of(st.integers(0, 200), st.integers(64 * 128 - 1, 64 * 128 * 3)),
    spread=st.sampled_from([1e-30, 0.1, 1.0, 4.0, 30.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradient_are_those_of_float64(isa: str, count: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, incoming = (torch.randn(count, generator=generator) for _ in range(2))
    before = kernels.set_isa(isa)
    try:
        assert_within_the_bounds(x * spread, incoming)
    finally:
        kernels.set_isa(before)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["-"]),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
)
def test_any_finite_numbers_are_within_the_bounds(isa: str, values: list[float]) -> None:
    before = kernels.set_isa(isa)
    try:
        assert_within_the_bounds(torch.tensor(values), torch.ones(len(values)))
    finally:
        kernels.set_isa(before)


@needs_native
def test_edges_and_what_is_not_finite(isa: str) -> None:
    edges = torch.tensor(EDGES)
    assert_within_the_bounds(torch.cat((edges, -edges)), torch.ones(2 * len(EDGES)))
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 0.0, 3e38])
    for filler in (0, 64):  # in a block of full length and in the rest of one
        padded = torch.cat((x, torch.zeros(filler)))
        value, gradient = with_gradient(padded, torch.ones_like(padded), "cpu")
        # Against the exact values, not torch: its AVX-512 kernel overflows at 3e38 and gives NaN at infinity.
        assert value[[0, 4, 5]].tolist() == [math.inf, 0.0, x[5].item()] and bool(value[1:4].isnan().all())
        assert gradient[4:6].tolist() == [0.5, 1.0] and bool(gradient[:4].isnan().all())
    incoming = torch.tensor([math.nan, math.inf, 0.0])
    gradient = with_gradient(torch.ones(3), incoming, "cpu")[1]
    assert gradient[0].isnan() and gradient[1] == math.inf and gradient[2] == 0


@needs_native
def test_the_bits_do_not_depend_on_threads_or_neighbours(isa: str) -> None:
    x, incoming = torch.randn(100_003), torch.randn(100_003)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(with_gradient(x, incoming, "cpu"))
    torch.set_num_threads(threads)
    for other in (*results[1:], with_gradient(x[:77], incoming[:77], "cpu")):
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a[: len(b)], b)


@needs_native
def test_a_strided_or_expanded_gradient_and_a_second_backward() -> None:
    x = torch.randn(6, 20, requires_grad=True)
    whole = torch.randn(20, 6)
    out = kernels.gelu(x, impl="cpu")
    first = torch.autograd.grad(out, x, whole.t(), retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, x, whole.t().contiguous(), retain_graph=True)[0])
    ones = torch.autograd.grad(out.sum(), x)[0]  # the sum's gradient is one number, expanded
    # Each of the two is within 3 eps of its incoming gradient, the product rounds once more.
    assert torch.allclose(first, ones * whole.t(), rtol=0, atol=7 * EPS * float(whole.abs().max()))


@needs_native
def test_second_order_is_torchs() -> None:
    """As a gradient penalty takes it: the gradient by input and weight of a loss that holds a first gradient."""
    generator = torch.Generator().manual_seed(0)
    x, weight, head = (torch.randn(shape, generator=generator) for shape in ((8, 12), (12, 16), (16,)))

    def penalty(impl: str) -> tuple[Tensor, ...]:
        dtype = torch.float32 if impl == "cpu" else torch.float64
        leaves = [one.to(dtype, copy=True).requires_grad_() for one in (x, weight)]
        loss = (kernels.gelu(leaves[0] @ leaves[1], impl=impl) @ head.to(dtype)).tanh().sum()
        inner = torch.autograd.grad(loss, leaves[0], create_graph=True)[0]
        return torch.autograd.grad(loss + inner.square().sum(), leaves)

    for got, exact in zip(penalty("cpu"), penalty("reference"), strict=True):
        # Sums of at most 16 terms through five operations in float32: some hundred eps of the largest entry.
        assert torch.allclose(got.double(), exact, rtol=0, atol=200 * EPS * float(exact.abs().max()))


@needs_native
def test_batched_gradients_and_forward_over_reverse_are_torchs() -> None:
    x = torch.randn(40, requires_grad=True)
    batch = torch.randn(3, 40)
    out = kernels.gelu(x, impl="cpu")
    rows = [torch.autograd.grad(out, x, row, retain_graph=True)[0] for row in batch]
    together = torch.autograd.grad(out, x, batch, is_grads_batched=True, retain_graph=True)[0]
    # The kernel's 3 eps and torch's few of the incoming gradient.
    assert torch.allclose(together, torch.stack(rows), rtol=0, atol=8 * EPS * float(batch.abs().max()))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(batch[0], batch[1])
        tangent = forward_ad.unpack_dual(torch.autograd.grad(out, x, dual)[0]).tangent
    assert tangent is not None and torch.allclose(tangent, rows[1], rtol=0, atol=8 * EPS * float(batch.abs().max()))


@needs_native
@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(4, dtype=torch.float64), "float64"),
        (torch.zeros(4, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(4, 6).t(), "contiguous"),
        (torch.zeros(4, device="meta"), "not a dense one on the CPU"),
        (torch.zeros(4).to_sparse(), "not a dense one on the CPU"),
    ],
)
def test_an_explicit_cpu_says_why_it_cannot(x: Tensor, reason: str) -> None:
    with pytest.raises(KernelUnavailable, match=reason):
        kernels.gelu(x, impl="cpu")


@needs_native
def test_transforms_are_left_to_the_reference() -> None:
    x = torch.randn(LARGE)
    start = counted()
    # Both are torch's own operations on the same numbers, in vectors of another start: an eps or two of |x| each.
    assert torch.allclose(torch.func.vmap(kernels.gelu)(x), functional.gelu(x), rtol=0, atol=4 * EPS * 6)
    torch.func.jvp(kernels.gelu, (x,), (torch.ones_like(x),))
    assert counted() == start
    with pytest.raises(KernelUnavailable, match="transforms"):
        torch.func.grad(lambda one: kernels.gelu(one, impl="cpu").sum())(x)


@needs_native
@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(LARGE, requires_grad=True)
    expected = with_gradient(x.detach(), torch.ones(LARGE), "cpu")
    out = torch.compile(lambda one: kernels.gelu(one), fullgraph=True)(x)
    assert torch.equal(out, expected[0])
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected[1])


# ---- models that know nothing of it ----------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("wanted", [True, False])
def test_inside_the_context_a_model_uses_the_kernel_and_outside_torch(wanted: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 512), nn.GELU(), nn.Linear(512, 4))
    x = torch.randn(LARGE[0], 32)
    results = []
    for context in (kernels.fast_forward, torch.enable_grad):
        start = counted()
        with context(), torch.set_grad_enabled(wanted):
            out = model(x)
        model.zero_grad()
        if wanted:
            out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        ran = counted() - start
        assert ran == ((2 if wanted else 1) if context is kernels.fast_forward else 0)
    for got, expected in zip(*results, strict=True):
        # Entries differ by some eps before sums of at most 512 terms, whose errors add up like roots: below 100 eps.
        assert torch.allclose(got, expected, rtol=0, atol=100 * EPS * float(expected.abs().max()))


@needs_native
def test_what_the_kernel_cannot_do_or_would_slow_down_is_left_to_torch() -> None:
    x = torch.randn(LARGE)
    start = counted()
    with kernels.fast_forward():
        functional.gelu(x, approximate="tanh")
        functional.gelu(x[:1])
        functional.gelu(x.double())
        functional.gelu(x.bfloat16())
        functional.gelu(x.t())
        assert counted() == start
        functional.gelu(input=x)
    assert counted() == start + 1


@needs_native
def test_the_bert_activation_of_transformers_is_seen() -> None:
    activations = pytest.importorskip("transformers.activations")
    start = counted()
    with kernels.fast_forward():
        activations.ACT2FN["gelu"](torch.randn(LARGE))
    assert counted() == start + 1


def test_the_reference_has_derivatives_to_any_order() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.gelu, (x,))
    assert torch.autograd.gradgradcheck(kernels.gelu, (x,))
