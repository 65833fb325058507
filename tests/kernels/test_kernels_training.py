"""What every training step pays for: the embedding's gradient and the norm that clipping needs."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ISAS, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels

# ---- the embedding's gradient ----------------------------------------------------------------------------------------


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 300, 9000]),
    width=st.sampled_from([1, 3, 16, 33]),
    shape=st.sampled_from([(0,), (1,), (5,), (4, 9), (2, 3, 40)]),
    padding=st.sampled_from([None, 0, -1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_the_gradient_is_torchs_to_the_bit(
    rows: int, width: int, shape: tuple[int, ...], padding: int | None, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    ids = torch.randint(rows, shape, generator=generator)
    incoming = torch.randn(*shape, width, generator=generator, dtype=dtype)
    expected = functional.embedding(ids, weight, padding_idx=padding)
    got = kernels.embedding(weight, ids, padding_idx=padding, impl="cpu")
    assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(out, weight, incoming)[0] for out in (got, expected)]
    assert torch.equal(*gradients)


@needs_native
def test_a_strided_gradient_and_a_second_backward_into_grad() -> None:
    """FGM's second pass adds to what the first one left in `.grad`; the first buffer must not change under it."""
    weight = torch.randn(50, 8, requires_grad=True)
    ids = torch.tensor([[1, 4, 4], [0, 1, 49]])
    whole = torch.randn(2, 3, 16)
    for times in (1, 2):
        kernels.embedding(weight, ids, impl="cpu").backward(whole[..., ::2])
        reference = weight.detach().clone().requires_grad_()
        functional.embedding(ids, reference).backward(whole[..., ::2])
        assert weight.grad is not None and reference.grad is not None
        assert torch.allclose(weight.grad, times * reference.grad, rtol=0, atol=1e-6)  # one rounding of each sum


@needs_native
def test_the_gradient_can_be_differentiated() -> None:
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, 2, 5])
    assert torch.autograd.gradcheck(lambda w: kernels.embedding(w, ids, impl="cpu"), (weight,))
    assert torch.autograd.gradgradcheck(lambda w: kernels.embedding(w, ids, impl="cpu") ** 3, (weight,))


def test_an_id_outside_the_table_is_refused() -> None:
    with pytest.raises(IndexError):
        kernels.embedding(torch.randn(4, 2, requires_grad=True), torch.tensor([4]))


@needs_native
def test_a_models_large_table_uses_the_kernel_and_small_or_special_ones_do_not() -> None:
    def counted() -> int:
        return kernels.used().get("embedding", {}).get("cpu", 0)

    table = torch.nn.Embedding(1 << 15, 32, padding_idx=0)
    ids = torch.randint(1 << 15, (4, 5))
    start = counted()
    with kernels.fast_forward():
        out = table(ids)
    out.sum().backward()
    assert counted() == start + 1
    with kernels.fast_forward():
        others = [
            torch.nn.Embedding(100, 8)(ids % 100),
            functional.embedding(ids, table.weight, sparse=True),
            functional.embedding(ids, table.weight, scale_grad_by_freq=True),
        ]
    for other in others:
        other.sum().backward()
    assert counted() == start + 1


# ---- the total norm --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 64, 1000, 65_536, 65_537, 200_000]), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),  # squares of the outer ones leave float32
    isa=st.sampled_from(ISAS or ["-"]),
    seed=st.integers(0, 2**31),
)
def test_the_norm_is_that_of_float64(counts: list[int], dtype: torch.dtype, scale: float, isa: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [(torch.randn(count, generator=generator) * scale).to(dtype) for count in counts]
    exact = math.sqrt(math.fsum(float((t.double() ** 2).sum()) for t in tensors))
    before = kernels.set_isa(isa) if ISAS else None
    try:
        norm = kernels.total_norm(tensors)
    finally:
        if before is not None:
            kernels.set_isa(before)
    assert norm.dtype == torch.float64
    if ISAS:  # sums of up to 1.2e6 squares in float64, in lanes and chunks: far below 1e6 eps = 2e-10
        assert math.isclose(float(norm), exact, rel_tol=1e-10)
    if scale == 1.0:  # its squares leave float32 elsewhere; sums of squares are good to some hundred eps
        assert math.isclose(float(kernels.total_norm(tensors, impl="reference")), exact, rel_tol=1e-4)


@needs_native
def test_the_norm_has_the_same_bits_for_any_number_of_threads() -> None:
    tensors = [torch.randn(300_000), torch.randn(17), torch.randn(123, 45)]
    threads = torch.get_num_threads()
    norms = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        norms.append(float(kernels.total_norm(tensors)))
    torch.set_num_threads(threads)
    assert norms[0] == norms[1] == norms[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_on(bad: float) -> None:
    tensor = torch.ones(100)
    tensor[70] = bad
    norm = float(kernels.total_norm([torch.ones(3), tensor]))
    assert math.isnan(norm) if math.isnan(bad) else math.isinf(norm)


def test_strided_tensors_are_left_to_the_reference() -> None:
    tensor: Tensor = torch.ones(4, 6).t()
    assert math.isclose(float(kernels.total_norm([tensor])), math.sqrt(24), rel_tol=1e-6)  # a float32 root
