"""Cases of dropout, on hidden states and on attention weights. Masks are random, so no errors are told."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Tensors, Tier, label

__all__ = ["KERNEL", "cases"]

KERNEL = "dropout"


def ours(x: Tensor) -> Tensor:
    """The kernel."""
    return kernels.dropout(x, 0.1)


def eager(x: Tensor) -> Tensor:
    """Torch's own."""
    return functional.dropout(x, 0.1)


def make(rows: int, device: torch.device, *, rest: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """Activations, and the gradient that comes in."""
    x, upstream = (torch.randn(rows, *rest, device=device).to(dtype) for _ in range(2))
    return {"x": x, "upstream": upstream}


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    single, half = torch.float32, torch.bfloat16
    hidden, attention = (32, 128, 768), (32, 12, 128, 128)
    return [
        _case(hidden, single, "quick"),
        _case(attention, single, "default"),
        _case(hidden, half, "default"),
        _case((256, *hidden[1:]), half, "full"),
    ]


def _case(shape: tuple[int, ...], dtype: torch.dtype, tier: Tier) -> Case:
    return Case(
        label=label(dtype, shape, "forward+backward"),
        facts={"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")},
        dtype=dtype,
        mode="forward+backward",
        rows=shape[0],
        width=math.prod(shape[1:]),
        make=partial(make, rest=shape[1:], dtype=dtype),
        wanted=("x",),
        functions={OURS: ours, "torch": eager},
        exact=None,
        memory=math.prod(shape) * dtype.itemsize * 4,
        # Both passes: the input and the gradient that comes in, their results.
        moved=4 * math.prod(shape) * dtype.itemsize,
        tier=tier,
    )
