"""The grids with which other kernels are tested by their authors, on ours: shapes, options and criteria are theirs."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import native

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")

loss_by = partial(kernels.cross_entropy, impl="cpu")
linear_by = partial(kernels.linear_cross_entropy, impl="cpu")

# The unit gradient is rounded to bfloat16, and once more when it is multiplied by what comes in: half an ulp each.
TWICE_ROUNDED = 2**-7


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("classes", [32000, 50264, 128256])
@pytest.mark.parametrize("rows", [8, 16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quack(classes: int, rows: int, dtype: torch.dtype) -> None:
    """QuACK: loss to 1e-5 in float32; the gradient to the rounding of its dtype."""
    logits = (0.1 * torch.randn(rows, classes)).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    loss = loss_by(logits, target, reduction="none")
    exact = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(exact, target, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    coming = torch.randn(rows)
    (got,) = torch.autograd.grad(loss, logits, coming)
    (right,) = torch.autograd.grad(expected, exact, coming)
    torch.testing.assert_close(got.float(), right, rtol=1e-5 if dtype == torch.float32 else TWICE_ROUNDED, atol=1e-7)


@pytest.mark.parametrize("frozen", ["x", "weight", "nothing", "all"])
def test_quack_frozen_parts(frozen: str) -> None:
    tensors = {"x": torch.randn(24, 64), "weight": torch.randn(32000, 64) * 0.1}
    wanted = [name for name in tensors if frozen not in (name, "all")]
    results = []
    for function in (linear_by, lambda x, weight, target: F.cross_entropy(x @ weight.t(), target)):
        leaves = {name: one.clone().requires_grad_(name in wanted) for name, one in tensors.items()}
        with torch.set_grad_enabled(bool(wanted)):
            loss = function(**leaves, target=torch.arange(24))
        assert loss.requires_grad == bool(wanted)
        results.append([loss.detach(), *(torch.autograd.grad(loss, [leaves[n] for n in wanted]) if wanted else ())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [50257, 128256])
@pytest.mark.parametrize(("smoothing", "scale", "z_loss"), itertools.product((0.0, 0.9), (1.0, 0.7), (0.0, 1.0)))
def test_flash_attention(classes: int, smoothing: float, scale: float, z_loss: float) -> None:
    """flash-attention's losses: heavy smoothing, a scale, a z-loss; bfloat16, an ignored row."""
    logits = torch.randn(12, classes).bfloat16().requires_grad_()
    target = torch.randint(0, classes, (12,))
    target[3] = -100
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}
    loss = loss_by(logits, target, scale=scale, z_loss=z_loss, **options)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact * scale, target, **options)
    squared = z_loss * torch.logsumexp(exact * scale, -1).square()
    expected = expected + squared.masked_fill(target == -100, 0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    coming = torch.randn(12)
    (got,) = torch.autograd.grad(loss, logits, coming)
    (right,) = torch.autograd.grad(expected, exact, coming.double())
    torch.testing.assert_close(got.double(), right, rtol=TWICE_ROUNDED, atol=1e-6)


CCE = [(256, 512, 128), (252, 507, 128), (252, 507, 123)]


@pytest.mark.parametrize("shape", CCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "ignored", "bias"), itertools.product((None, 20.0), (False, True), (False, True)))
def test_cut_cross_entropy(
    shape: tuple[int, int, int], dtype: torch.dtype, softcap: float | None, ignored: bool, bias: bool
) -> None:
    """CCE's criterion: not further from float32 than torch in half precision, beyond its tolerance."""
    rows, classes, width = shape
    x, weight = (torch.randn(rows, width) / width**0.5).to(dtype), torch.randn(classes, width).to(dtype)
    offset = torch.randn(classes).to(dtype) if bias else None
    target = torch.randint(0, classes, (rows,))
    if ignored:
        target[torch.randperm(rows)[: rows // 2]] = -100

    def plain(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
        logits = F.linear(x, weight, offset).float()
        return F.cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), target)

    def gradients(function: Any, as_dtype: torch.dtype) -> list[Tensor]:
        leaves = [one.to(as_dtype).requires_grad_() for one in (x, weight, *(() if offset is None else (offset,)))]
        loss = function(*leaves, *(() if bias else (None,)))
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    ours = gradients(lambda x, w, b: linear_by(x, w, target, bias=b, softcap=softcap, chunk_rows=100), dtype)
    exact, low = gradients(plain, torch.float32), gradients(plain, dtype)
    allowed = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 1e-3}[dtype]
    for got, right, torchs in zip(ours, exact, low, strict=True):
        error, its = ((one.float() - right).abs().max() for one in (got, torchs))
        assert float(error) <= float(its) + allowed
