"""Cases of the embedding lookup, whose gradient is a whole table for a few rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Tensors, Tier, label

__all__ = ["KERNEL", "cases"]

KERNEL = "embedding"


def ours(weight: Tensor, ids: Tensor) -> Tensor:
    """The kernel."""
    return kernels.embedding(weight, ids)


def eager(weight: Tensor, ids: Tensor) -> Tensor:
    """Torch's own."""
    return functional.embedding(ids, weight)


def make(rows: int, device: torch.device, *, vocabulary: int, width: int) -> Tensors:
    """A table, tokens, and the gradient that comes in."""
    generator = torch.Generator(device).manual_seed(0)
    return {
        "weight": torch.randn(vocabulary, width, device=device, generator=generator),
        "ids": torch.randint(0, vocabulary, (rows,), device=device, generator=generator),
        "upstream": torch.randn(rows, width, device=device, generator=generator),
    }


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    more = 8 if device == "cuda" else 1
    return [
        _case(1024 * more, 30522, 384, "quick"),
        _case(4096 * more, 30522, 768, "default"),
        _case(4096 * more, 151936, 896, "full"),
    ]


def _case(tokens: int, vocabulary: int, width: int, tier: Tier) -> Case:
    return Case(
        label=f"{label(torch.float32, (tokens,), 'forward+backward')} tokens of {vocabulary:,} x {width}",
        facts={"tokens": tokens, "vocabulary": vocabulary, "width": width, "dtype": "float32"},
        dtype=torch.float32,
        mode="forward+backward",
        rows=tokens,
        width=width,
        make=partial(make, vocabulary=vocabulary, width=width),
        wanted=("weight",),
        functions={OURS: ours, "torch": eager},
        memory=vocabulary * width * 4 * 2,
        # The table's gradient is written; the rows of the tokens are read and written, as is what comes in.
        moved=4 * width * (vocabulary + 4 * tokens),
        tier=tier,
    )
