"""What the tests of `kl_pair` share: random cases, the exact answer in float64, and how far from it one may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import native, triton_runtime

# Below and across a vector (16, 8, 4, 2 lanes), short rows (to 128 classes), blocks (1024), two blocks.
CLASSES = [1, 2, 3, 7, 16, 17, 64, 77, 128, 129, 300, 1023, 1024, 1025, 2100]
NATIVE = [torch.float32, torch.bfloat16, torch.float64]
GPU = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["symmetric", "forward", "reverse"]

# The interpreter cannot be switched on here: `test_kernels_kl_pair_triton.py` runs the tests in a process that has it.
INTERPRETED = triton_runtime.INTERPRETED and triton_runtime.why_missing() is None
IMPLEMENTATIONS = ["triton"] if INTERPRETED else ["cpu", "reference"]


@dataclass
class Result:
    loss: Tensor
    by_a: Tensor | None
    by_b: Tensor | None


@dataclass
class Case:
    a: Tensor
    b: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    wanted: tuple[bool, bool]

    def result_of(self, function: Any, dtype: torch.dtype | None = None, **more: Any) -> Result:
        """Return loss and gradients in float64, for an uneven incoming gradient."""
        leaves = [
            (x if dtype is None else x.to(dtype)).detach().requires_grad_(wanted)
            for x, wanted in zip((self.a, self.b), self.wanted, strict=True)
        ]
        loss = function(*leaves, mask=self.mask, **self.options, **more)
        incoming = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
        gradients = iter(torch.autograd.grad(loss, [x for x in leaves if x.requires_grad], incoming))
        by_a, by_b = (next(gradients).double() if wanted else None for wanted in self.wanted)
        return Result(loss.detach().double(), by_a, by_b)

    def differences(self) -> tuple[float, float]:
        """Return the largest |x_i - max x| and the largest |(x - y)_i - (max x - max y)| over all rows that count."""
        rows = slice(None) if self.mask is None else self.mask
        x, y = ((one.double() / self.options["temperature"])[rows] for one in (self.a, self.b))
        if not x.numel():
            return 0.0, 0.0
        tops = x.amax(1, keepdim=True), y.amax(1, keepdim=True)
        span = max(float((top - one).max()) for top, one in zip(tops, (x, y), strict=True))
        return span, float(((x - y) - (tops[0] - tops[1])).abs().max())


def plain(
    a: Tensor,
    b: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "sum",
    direction: str = "symmetric",
) -> Tensor:
    """The divergence as it is usually written."""
    if mask is not None:
        a, b = a[mask], b[mask]
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (a, b))
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    rows = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[direction]
    if reduction == "none" and mask is not None:
        return torch.zeros(mask.shape, dtype=rows.dtype).masked_scatter(mask, rows)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Case:
    rows, classes = draw(st.integers(1, 19)), draw(st.sampled_from(CLASSES))
    if classes > 200:
        rows = min(rows, 3)
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale, noise = draw(st.sampled_from([0.1, 1.0, 8.0])), draw(st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 10.0]))
    first = torch.randn(rows, classes + 3, generator=generator, dtype=torch.float64) * scale
    second = first + torch.randn(first.shape, generator=generator, dtype=torch.float64) * noise
    a, b = (
        _laid_out(x.to(dtype), classes, draw(st.sampled_from(["contiguous", "strided", "transposed", "expanded"])))
        for x in (first, second)
    )
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(rows, generator=generator) < 0.7
        mask[0] = True  # a mean over nothing has its own test
        if draw(st.booleans()):
            mask = mask.repeat_interleave(2)[::2]
    options = {
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.5])),
        "reduction": draw(st.sampled_from(["sum", "mean", "none"])),
        "direction": draw(st.sampled_from(DIRECTIONS)),
    }
    return Case(a, b, mask, options, draw(st.sampled_from([(True, True), (True, False), (False, True)])))


def _laid_out(values: Tensor, classes: int, layout: str) -> Tensor:
    if layout == "strided":
        return values[:, 1 : classes + 1]
    if layout == "transposed":
        return values[:, :classes].t().contiguous().t()
    if layout == "expanded":
        return values[:1, :classes].expand(values.shape[0], -1)
    return values[:, :classes].contiguous()


def error(value: Tensor | None, exact: Tensor | None) -> float:
    if value is None or exact is None:
        assert value is exact, "a gradient that nobody wanted, or none where one is wanted"
        return 0.0
    return float((value - exact).abs().max()) if value.numel() else 0.0


def size(value: Tensor | None) -> float:
    return float(value.abs().max()) if value is not None and value.numel() else 0.0


def assert_close_to_float64(case: Case, impl: str, function: Any = kernels.kl_pair) -> None:
    """Loss and gradients by `impl` against float64, with at most twice the error of plain torch in float32.

    Beyond that, rounding is allowed. With eps of the accumulator, S the largest |x_i - max x| and D the largest
    |v_i| + |r| of `csrc/kl_pair/terms.inl` (twice the largest |v|):

    - A probability has the relative error (S + k) eps: of its exponent and k = 32 for exponential, sums and division.
    - u has the error eps D. A loss p h(u) changes by |q - p| eps D with it, and sum |q - p| <= sqrt(2 KL) (Pinsker).
    - A gradient p (v - mean) has the errors of p, of v and of the mean, each at most (S + k) eps D; the rest of it is
      q - p with that of p.

    What stands for exact has errors too: log p and log q in float64 that of (S + k) units, and with them u, the loss
    and the gradients.
    """
    wide = native.accumulator_dtype(case.a.dtype)
    exact = case.result_of(plain, torch.float64)
    usual, ours = case.result_of(plain, wide), case.result_of(function, impl=impl)
    eps, narrow_eps = torch.finfo(wide).eps, torch.finfo(case.a.dtype).eps
    span, moved = case.differences()
    relative, difference = (span + 32) * eps, 2 * moved
    rows = case.a.shape[0] if case.options["reduction"] == "sum" else 1
    loss = size(exact.loss)
    allowed = relative * loss + eps * difference * rows * min(2.0, (2 * loss) ** 0.5)
    inexact = (span + 32) * torch.finfo(torch.float64).eps * (difference + 1)
    allowed += inexact * rows
    assert error(ours.loss, exact.loss) <= 2 * error(usual.loss, exact.loss) + allowed
    # The incoming gradient is at most 2. A mean of few rows may cancel it, which only widens the margin.
    incoming = 2.0 / case.options["temperature"]
    for got, of_torch, true in ((ours.by_a, usual.by_a, exact.by_a), (ours.by_b, usual.by_b, exact.by_b)):
        slack = relative * (size(true) + incoming * difference) + narrow_eps * size(true) + incoming * inexact
        # The gradient for 1 and its product with what comes in are each rounded by half a unit; the interpreter, which
        # truncates to bfloat16, is off by a whole one in the first.
        slack += narrow_eps / 2 * size(true) if INTERPRETED and case.a.dtype == torch.bfloat16 else 0.0
        # Half-precision gradients end in subnormal numbers.
        slack += float(torch.finfo(case.a.dtype).smallest_normal) * narrow_eps
        assert error(got, true) <= 2 * error(of_torch, true) + slack
