"""Cases of the divergence between two predictions of the same rows (R-Drop, VAT, distillation)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Mode, Tensors, Tier, label

__all__ = ["KERNEL", "cases"]

KERNEL = "kl_pair"

SIZES = ((4096, 2), (2048, 1000), (512, 30522), (512, 50257), (256, 151936))


def ours(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Looked up by name: this file may be ahead of its kernel."""
    loss: Tensor = getattr(kernels, KERNEL)(a, b, mask=mask, reduction="sum", direction="symmetric")
    return loss


def eager(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """R-Drop's (KL(a, b) + KL(b, a)) / 2, written well: two log-softmaxes, and one product for both directions."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    log_a, log_b = functional.log_softmax(a.to(wide), -1), functional.log_softmax(b.to(wide), -1)
    rows = ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(-1) / 2
    return (rows if mask is None else rows * mask).sum()


def make(rows: int, device: torch.device, *, classes: int, dtype: torch.dtype, masked: float) -> Tensors:
    """Two sets of logits that differ as those of two dropout masks do."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(rows, classes, device=device, generator=generator)
    b = a + 0.3 * torch.randn(rows, classes, device=device, generator=generator)
    found: Tensors = {"a": a.to(dtype), "b": b.to(dtype)}
    if masked:
        found["mask"] = torch.arange(rows, device=device) >= int(masked * rows)
    return found


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    more = 16 if device == "cuda" else 1
    half, single = torch.bfloat16, torch.float32
    sizes = [(rows * more, classes) for rows, classes in SIZES]
    return [
        _case(*sizes[0], single),
        _case(*sizes[1], single),
        *(_case(*sizes[2], dtype, tier="quick") for dtype in (single, half)),
        _case(*sizes[2], single, masked=0.5),
        _case(*sizes[2], single, mode="second order"),
        *(_case(*size, dtype, tier="full") for size in sizes[3:] for dtype in (single, half, torch.float16)),
    ]


def _case(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    masked: float = 0.0,
    mode: Mode = "forward+backward",
    tier: Tier = "default",
) -> Case:
    return Case(
        label=label(dtype, (rows, classes), mode, f"masked {masked}" if masked else ""),
        facts={"rows": rows, "classes": classes, "dtype": str(dtype).removeprefix("torch."), "masked": masked},
        dtype=dtype,
        mode=mode,
        rows=rows,
        width=2 * classes,
        make=partial(make, classes=classes, dtype=dtype, masked=masked),
        wanted=("a", "b"),
        functions={OURS: ours, "torch": eager},
        memory=rows * classes * 40 * (2 if mode == "second order" else 1),
        moved=2 * (2 - masked) * rows * classes * dtype.itemsize,
        tier=tier,
    )
