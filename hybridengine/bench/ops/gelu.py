"""Cases of GELU: the inner width of a small encoder and of a base one."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Tensors, Tier, label

__all__ = ["KERNEL", "cases"]

KERNEL = "gelu"


def make(rows: int, device: torch.device, *, width: int, dtype: torch.dtype) -> Tensors:
    """Activations, and the gradient that comes in."""
    generator = torch.Generator(device).manual_seed(0)
    x, upstream = (torch.randn(rows, width, device=device, generator=generator).to(dtype) for _ in range(2))
    return {"x": x, "upstream": upstream}


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    more = 16 if device == "cuda" else 1
    return [
        _case(512 * more, 1536, torch.float32, "quick"),
        _case(2048 * more, 3072, torch.float32, "default"),
        _case(2048 * more, 3072, torch.bfloat16, "full"),
    ]


def _case(rows: int, width: int, dtype: torch.dtype, tier: Tier) -> Case:
    size = rows * width * dtype.itemsize
    return Case(
        label=label(dtype, (rows, width), "forward+backward"),
        facts={"rows": rows, "width": width, "dtype": str(dtype).removeprefix("torch.")},
        dtype=dtype,
        mode="forward+backward",
        rows=rows,
        width=width,
        make=partial(make, width=width, dtype=dtype),
        wanted=("x",),
        functions={OURS: kernels.gelu, "torch": functional.gelu},
        memory=4 * size,
        moved=5 * size,  # forward x and its value; backward x again, the gradient that comes in and the one that goes
        tier=tier,
    )
