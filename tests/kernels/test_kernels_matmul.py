"""Products of bfloat16 matrices in the tiles of a CPU, against float64 and the bounds of their rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import native
from hybridengine.kernels.linear_cross_entropy.amx import matmul

pytestmark = pytest.mark.skipif(not native.has_tiles(), reason="this CPU does not multiply in tiles (AMX)")

# Around whole tiles (16), panels (32), and what is packed at a time (512 deep, 1024 columns).
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 1024, 1030, 1100]))
EPS = 2.0**-24


def bound(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """How far each entry may be off.

    A float32 sum of n terms in any order: n eps of the sum of their magnitudes. A float32 entry of A that is cut to 8
    bits, its rest below 2^-7 of it rounded to 8 bits, is off by 2^-15 of itself; a small one rounded to 8, by 2^-8:
    below 1/64 of the largest in its contiguous line.
    """
    is_cut, lines = a.dtype == torch.float32, 1 if a.stride(1) == 1 or 1 not in a.stride() else 0
    a, b = a.double().abs(), b.double().abs()
    largest = a.amax(lines, keepdim=True)
    rounded = a * torch.where(a >= largest / 64, 2.0**-15, 2.0**-8) if is_cut else torch.zeros_like(a)
    return rounded @ b + (a.shape[1] + 2) * EPS * (a @ b + c.double().abs())


def in_layout_of(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in another dtype, at the same strides."""
    base = matrix if matrix._base is None else matrix._base
    return base.to(dtype).as_strided(matrix.shape, matrix.stride(), matrix.storage_offset())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, depth = draw(SIZES), draw(SIZES), draw(SIZES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def matrix(height: int, width: int, spread: float) -> Tensor:
        """With rows, columns or nothing contiguous, or one number throughout; magnitudes `spread` decades apart."""
        layout, gap = draw(st.sampled_from(["lines", "lines", "lines", "apart", "expanded"])), draw(st.integers(0, 3))
        if layout == "expanded":
            return torch.randn(draw(st.sampled_from([(1, 1), (1, width)])), generator=generator).expand(height, width)
        if layout == "apart":
            return torch.randn(height, 2 * width, generator=generator)[:, ::2]
        turned = draw(st.booleans())
        shape = (width, height + gap) if turned else (height, width + gap)
        values = torch.randn(shape, generator=generator) * 10 ** (spread * torch.randn(shape, generator=generator))
        return (values.t()[:height] if turned else values)[:, :width]

    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    a = matrix(rows, depth, draw(st.sampled_from([0.0, 1.0])))
    b = matrix(depth, columns, 0.0)
    a, b = (one if to == one.dtype else in_layout_of(one, to) for one, to in ((a, dtype), (b, torch.bfloat16)))
    return a, b, torch.randn(rows, columns + draw(st.sampled_from([0, 5])), generator=generator)[:, :columns]


def check(a: Tensor, b: Tensor, c: Tensor, accumulate: bool) -> None:
    start = c.clone() if accumulate else torch.zeros_like(c)
    exact = a.double() @ b.double() + start.double()
    before = a.clone(), b.clone()
    if not accumulate:
        rounded = torch.empty(c.shape, dtype=torch.bfloat16)
        matmul(a, b, rounded)
    surrounding = c._base
    outside = None if surrounding is None else surrounding[:, c.shape[1] :].clone()
    matmul(a, b, c, accumulate=accumulate)
    off = (c.double() - exact).abs()
    assert bool((off <= bound(a, b, start)).all())
    assert accumulate or torch.equal(rounded, c.bfloat16())
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    assert outside is None or (surrounding is not None and torch.equal(outside, surrounding[:, c.shape[1] :]))


@settings(max_examples=500, deadline=None)
@given(problem=problems(), accumulate=st.booleans())
def test_within_the_bounds_of_rounding(problem: tuple[Tensor, Tensor, Tensor], accumulate: bool) -> None:
    check(*problem, accumulate)


@pytest.mark.long
@pytest.mark.slow
@settings(max_examples=1_000, deadline=None)
@given(problem=problems(), accumulate=st.booleans())
def test_within_the_bounds_of_rounding_at_length(problem: tuple[Tensor, Tensor, Tensor], accumulate: bool) -> None:
    check(*problem, accumulate)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(70, 3000, 700), (3000, 70, 700), (70, 1500, 9000), (40, 33, 9000)])
def test_any_number_of_threads(threads: int, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    generator = torch.Generator().manual_seed(threads)
    a, b = torch.randn(rows, depth, generator=generator), torch.randn(depth, columns, generator=generator).bfloat16()
    for accumulate in (False, True):
        check(a, b, torch.randn(rows, columns, generator=generator), accumulate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [40, 2000])
def test_infinity_and_nan_stay_in_their_rows(dtype: torch.dtype, depth: int) -> None:
    a, b = torch.randn(40, depth).to(dtype), torch.rand(depth, 50).bfloat16() + 1
    a[3, 7], a[5, 9], a[35, depth - 1] = float("inf"), float("-inf"), float("nan")
    c = torch.empty(40, 50)
    matmul(a, b, c)
    assert bool((c[3] == float("inf")).all()) and bool((c[5] == float("-inf")).all()) and bool(c[35].isnan().all())
    rest = [row for row in range(40) if row not in (3, 5, 35)]
    assert bool(c[rest].isfinite().all())


def test_the_largest_numbers_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    c = torch.empty(1, 1)
    matmul(torch.full((1, 1), largest), torch.full((1, 1), 0.5).bfloat16(), c)
    assert abs(float(c) / (largest / 2) - 1) < 2.0**-15


@pytest.mark.parametrize("shape", [(0, 5, 7), (4, 0, 7), (4, 5, 0)])
def test_nothing(shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    c = torch.ones(rows, columns)
    matmul(torch.ones(rows, depth), torch.ones(depth, columns).bfloat16(), c, accumulate=True)
    assert bool((c == 1).all())
    for made in (c, c.bfloat16()):
        matmul(torch.ones(rows, depth), torch.ones(depth, columns).bfloat16(), made)
        assert bool((made == 0).all())


@pytest.mark.parametrize(
    ("a", "b", "out", "reason"),
    [
        (torch.ones(4, 6), torch.ones(3, 4).bfloat16(), torch.ones(4, 4), "expected a"),
        (torch.ones(4, 3), torch.ones(3, 4).bfloat16(), torch.ones(4, 5), "expected a"),
        (torch.ones(4, 3), torch.ones(3, 4), torch.ones(4, 4), "b in bfloat16"),
        (torch.ones(4, 3).double(), torch.ones(3, 4).bfloat16(), torch.ones(4, 4), "b in bfloat16"),
        (torch.ones(4, 3), torch.ones(3, 4).bfloat16(), torch.ones(4, 8)[:, ::2], "contiguous rows"),
    ],
)
def test_what_does_not_fit_is_refused(a: Tensor, b: Tensor, out: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        matmul(a, b, out)


def test_adds_to_float32_only() -> None:
    with pytest.raises(ValueError, match="adds to float32 only"):
        matmul(torch.ones(2, 2), torch.ones(2, 2).bfloat16(), torch.zeros(2, 2).bfloat16(), accumulate=True)


def test_refused_without_tiles() -> None:
    before = kernels.set_isa("avx512")
    try:
        assert not native.has_tiles()
        with pytest.raises(ValueError, match="needs a CPU with AMX"):
            matmul(torch.ones(2, 2), torch.ones(2, 2).bfloat16(), torch.empty(2, 2))
    finally:
        kernels.set_isa(before)
    assert native.has_tiles()


def test_large_numbers_among_small_ones_are_not_rounded() -> None:
    """As in the gradient of logits: an entry near -1 in each row, the rest small. The sum keeps float32's place."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(64, 8000, generator=generator) / 8000
    a[torch.arange(64), torch.randint(0, 8000, (64,), generator=generator)] -= 0.7
    b = torch.randn(8000, 48, generator=generator).bfloat16()
    c = torch.empty(64, 48)
    matmul(a, b, c)
    exact = a.double() @ b.double()
    error = float((c.double() - exact).norm() / exact.norm())
    rounded = float((a.bfloat16().double() @ b.double() - exact).norm() / exact.norm())
    assert error < 1e-4 < 5e-4 < rounded
