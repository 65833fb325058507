"""Cases of the total norm of all gradients, as clipping needs it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Tensors, Tier, label

__all__ = ["KERNEL", "cases"]

KERNEL = "total_norm"


def eager(tensors: list[Tensor]) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` computes."""
    return torch.nn.utils.get_total_norm(tensors)


def make(rows: int, device: torch.device, *, layers: int, dtype: torch.dtype) -> Tensors:
    """The gradients of an encoder: for each layer four square matrices, two four times as long, and vectors."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(rows, rows)] * 4 + [(rows, 4 * rows)] * 2 + [(rows,)] * 8
    return {
        "tensors": [
            torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(layers) for shape in shapes
        ]
    }


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    single = torch.float32
    return [
        _case(384, 6, single, "quick"),
        _case(768, 12, single, "default"),
        _case(768, 12, torch.bfloat16, "default" if device == "cuda" else "full"),
    ]


def _case(width: int, layers: int, dtype: torch.dtype, tier: Tier) -> Case:
    return Case(
        label=f"{label(dtype, (width,), 'forward+backward')} wide, {layers} layers",
        facts={"width": width, "layers": layers, "dtype": str(dtype).removeprefix("torch.")},
        dtype=dtype,
        mode="forward",
        rows=width,
        width=1,  # float64 takes all of it
        make=partial(make, layers=layers, dtype=dtype),
        wanted=(),
        functions={OURS: kernels.total_norm, "torch": eager},
        memory=layers * 12 * width * width * dtype.itemsize,
        tier=tier,
    )
