"""Cases of the moving average of all weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Tensors, label
from hybridengine.bench.ops import perturb_weights

__all__ = ["KERNEL", "cases"]

KERNEL = "ema_update"

RATE = 0.001


def ours(averages: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The kernel; the largest matrix tells whether it is right."""
    kernels.ema_update(averages, weights, rate=RATE)
    return averages[0]


def lerp(averages: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Torch's multi-tensor function."""
    torch._foreach_lerp_(averages, weights, RATE)
    return averages[0]


def make(rows: int, device: torch.device, *, layers: int, vocabulary: int, dtype: torch.dtype) -> Tensors:
    """Averages and weights of an encoder `rows` wide."""
    both = perturb_weights.make(rows, device, layers=layers, vocabulary=vocabulary, dtype=dtype)
    return {"averages": both["gradients"], "weights": both["weights"]}


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    width, layers, vocabulary, dtype = 384, 6, 30522, torch.float32
    elements = (vocabulary + 512) * width + layers * 12 * width * width
    return [
        Case(
            label=f"{label(dtype, (width,), 'forward+backward')} wide, {layers} layers",
            facts={"width": width, "layers": layers, "dtype": "float32"},
            dtype=dtype,
            mode="forward",
            rows=width,
            width=1,  # float64 takes all of it
            make=partial(make, layers=layers, vocabulary=vocabulary, dtype=dtype),
            wanted=(),
            functions={OURS: ours, "torch": lerp},
            exact=None,  # every call moves the averages on: two competitors agree after equally many calls alone
            memory=elements * dtype.itemsize,
            moved=3 * elements * dtype.itemsize,
            mutating=frozenset({OURS, "torch", "compile"}),
            tier="quick",
        )
    ]
