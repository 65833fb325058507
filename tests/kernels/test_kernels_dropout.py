"""Counter-based dropout: the generator's published answers, the two implementations, and models that use it unasked."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import ISAS, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hybridengine import kernels
from hybridengine.kernels import forward
from hybridengine.kernels.dropout.reference import threefry

LARGE = (64, 512)  # elements enough for the kernel to pay


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # `threefry2x32 20` of kat_vectors in Random123, the authors' own library
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_generator_gives_the_published_words(
    key: tuple[int, int], counter: tuple[int, int], words: tuple[int, int]
) -> None:
    first, second = threefry(key, (torch.tensor(counter[0]), torch.tensor(counter[1])))
    assert (int(first), int(second)) == words


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    count=st.one_of(st.integers(0, 70), st.integers(32 * 1024 - 2, 32 * 1024 * 3)),
    p=st.floats(1e-6, 1 - 1e-6),
    seed=st.integers(0, 2**63 - 1),
)
def test_both_implementations_agree_to_the_bit(isa: str, dtype: torch.dtype, count: int, p: float, seed: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = kernels.set_isa(isa)
    try:
        native = kernels.dropout(x, p, seed=seed, impl="cpu")
    finally:
        kernels.set_isa(before)
    assert torch.equal(native, kernels.dropout(x, p, seed=seed, impl="reference"))


@given(p=st.floats(0.02, 0.98), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_the_share_dropped_is_p_and_the_mean_is_kept(p: float, seed: int) -> None:
    count = 1 << 16
    out = kernels.dropout(torch.ones(count), p, seed=seed)
    dropped = int((out == 0).sum())
    # Six standard deviations of a binomial: exceeded once in 5e8 draws.
    assert abs(dropped - p * count) <= 6 * math.sqrt(count * p * (1 - p))
    kept = out[out != 0]
    # p is rounded to 2^-16, at most half a unit off; the scale follows what is really dropped.
    assert bool((kept == kept[0]).all()) and abs(1 / float(kept[0]) - (1 - p)) <= 2**-17 + 1e-6


def test_masks_of_two_seeds_are_independent() -> None:
    count = 1 << 16
    one, two = ((kernels.dropout(torch.ones(count), 0.5, seed=seed) != 0).float() for seed in (1, 2))
    both = float((one * two).sum())
    assert abs(both - count / 4) <= 6 * math.sqrt(count * 3 / 16)  # binomial with share 1/4


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_native)])
def test_the_gradient_passes_where_the_value_does_to_any_order(impl: str) -> None:
    x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)

    def run(value: Tensor) -> Tensor:
        return kernels.dropout(value, 0.3, seed=9, impl=impl)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(lambda value: run(value) ** 3, (x,))


def test_the_global_generator_decides_when_no_seed_is_given() -> None:
    x = torch.ones(LARGE)
    torch.manual_seed(5)
    first, second = kernels.dropout(x, 0.1), kernels.dropout(x, 0.1)
    torch.manual_seed(5)
    assert torch.equal(first, kernels.dropout(x, 0.1)) and not torch.equal(first, second)


def test_the_ends_of_p_and_wrong_arguments() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(kernels.dropout(x, 0.0), x) and not kernels.dropout(x, 1.0).any()
    with pytest.raises(ValueError, match="probability"):
        kernels.dropout(x, 1.5)
    with pytest.raises(ValueError, match="seed"):
        kernels.dropout(x, 0.5, seed=-1)


# ---- models that know nothing of it ----------------------------------------------------------------------------------


def counted() -> int:
    return kernels.used().get("dropout", {}).get("cpu", 0)


@needs_native
def test_inside_the_context_a_module_uses_the_kernel_and_outside_torch() -> None:
    layer, x = nn.Dropout(0.1), torch.ones(LARGE)
    start = counted()
    torch.manual_seed(1)
    with kernels.fast_forward():
        inside = layer(x)
        layer.eval()
        assert layer(x) is x or torch.equal(layer(x), x)
        functional.dropout(x[:1], 0.1)  # too small to pay
    assert counted() == start + 1
    torch.manual_seed(1)
    assert torch.equal(inside, kernels.dropout(x, 0.1))
    functional.dropout(x, 0.1)
    assert counted() == start + 2  # the comparison above


@needs_native
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_differs_from_torchs_by_the_mask_alone(
    kind: str, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the dropout taken out, the steps are torch's attention, also for a row that may look at nothing."""
    generator = torch.Generator().manual_seed(0)
    shape, exact = (4, 3, 40, 8), torch.float64
    query, key, value = (torch.randn(shape, generator=generator, dtype=exact, requires_grad=True) for _ in range(3))
    allowed = torch.rand(4, 1, 40, 40, generator=generator) < 0.7
    allowed[0, :, 3] = False
    mask = {"none": None, "bool": allowed, "float": torch.where(allowed, 0.0, -1e4).to(exact)}[kind]
    expected = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    monkeypatch.setattr(forward, "dropout", lambda x, p: x)
    with kernels.fast_forward():
        got = functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=0.1, scale=scale)
    # Sums of 8 and 40 products in another order, next to -1e4 in one row: some ten eps of 1e4 in float64.
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (query, key, value)) for out in (got, expected)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


@needs_native
def test_attention_drops_whole_weights_and_keeps_the_expectation() -> None:
    query = torch.zeros(8, 4, 64, 8)  # uniform attention over 64 keys
    value = torch.ones(8, 4, 64, 8)
    start = counted()
    with kernels.fast_forward():
        out = functional.scaled_dot_product_attention(query, query, value, dropout_p=0.25)
    assert counted() == start + 1
    # Each entry is a mean of 64 weights of 0 or 4/3, a whole number of 1/48; their variance is 1/3 each.
    assert torch.allclose((out * 48).round(), out * 48, atol=1e-3)
    rows = out[..., 0]
    assert abs(float(rows.mean()) - 1) <= 6 * math.sqrt(1 / 3 / 64 / rows.numel())


def test_what_the_kernel_cannot_do_is_left_to_torch() -> None:
    x = torch.ones(LARGE)
    start = counted()
    with kernels.fast_forward():
        functional.dropout(x.clone(), 0.1, inplace=True)
        functional.dropout(x.half(), 0.1)
        functional.scaled_dot_product_attention(*[torch.randn(4, 4, 64, 8)] * 3, dropout_p=0.1, is_causal=True)
        torch.func.vmap(lambda row: functional.dropout(row, 0.1), randomness="different")(x)
    assert counted() == start
