"""Cases of cross-entropy: classifier heads with few classes, where plain torch is hard to beat, and vocabularies."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Function, Mode, Tensors, Tier, label
from hybridengine.bench.competitors import imported

__all__ = ["KERNEL", "cases"]

KERNEL = "cross_entropy"

VOCABULARIES = (2, 30522, 50257, 151936, 256000, 128256)
FEW_CLASSES = ((2048, 2), (8192, 2), (4096, 10), (2048, 100), (2048, 1000))
MODES: tuple[Mode, ...] = ("forward", "forward+backward", "second order")


def float32_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Torch with the float32 loss that the kernel promises; on half-precision logits plain torch rounds the loss."""
    return functional.cross_entropy(logits.float(), target)


FUNCTIONS: dict[str, Function] = {
    OURS: kernels.cross_entropy,
    "torch": functional.cross_entropy,
    "torch fp32-loss": float32_loss,  # for half precision alone
    "liger": imported("liger_kernel.transformers.functional", "liger_cross_entropy"),
    "quack": imported("quack.cross_entropy", "cross_entropy"),
}


def make(rows: int, device: torch.device, *, classes: int, dtype: torch.dtype, masked: float) -> Tensors:
    """Logits and labels; the last share of the rows is ignored."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, classes, device=device, generator=generator).to(dtype)
    target = torch.randint(0, classes, (rows,), device=device, generator=generator)
    target[rows - int(masked * rows) :] = -100
    return {"logits": logits, "target": target}


def cases(device: str) -> list[Case]:
    """The cases of a device; those of `--full` are the whole matrix."""
    half, single = torch.bfloat16, torch.float32
    sizes = [(512, 30522), (512, 50257), (256, 151936)]
    if device == "cuda":
        sizes = [(8192, 30522), (8192, 128256), (16384, 151936)]
    rows, classes = sizes[0]
    found = [_case(*size, single, tier="quick" if size in FEW_CLASSES[:3:2] else "default") for size in FEW_CLASSES]
    found += [_case(rows, classes, dtype, tier="quick") for dtype in (single, half)]
    found += [_case(*size, dtype) for size in sizes[1:] for dtype in (single, half)]
    found += [
        _case(rows, classes, single, masked=0.9),
        _case(rows, classes, single, mode="forward"),
        _case(rows, classes, single, mode="second order"),
    ]
    return found + [
        _case(many, size, dtype, masked, mode, tier="full")
        for size in VOCABULARIES
        for many in (512, 2048, 8192, 32768)
        for dtype in (single, half, torch.float16)
        for masked in (0.0, 0.5, 0.9)
        for mode in MODES
    ]


def _case(
    rows: int,
    classes: int,
    dtype: torch.dtype,
    masked: float = 0.0,
    mode: Mode = "forward+backward",
    tier: Tier = "default",
) -> Case:
    functions = {n: f for n, f in FUNCTIONS.items() if n != "torch fp32-loss" or dtype != torch.float32}
    logits = rows * classes
    # An ignored row need not be read, but its gradient is written.
    touched = 2 - masked if mode != "forward" else 1 - masked
    return Case(
        label=label(dtype, (rows, classes), mode, f"masked {masked}" if masked else ""),
        facts={"rows": rows, "classes": classes, "dtype": str(dtype).removeprefix("torch."), "masked": masked},
        dtype=dtype,
        mode=mode,
        rows=rows,
        width=classes,
        make=partial(make, classes=classes, dtype=dtype, masked=masked),
        wanted=("logits",),
        functions=functions,
        memory=logits * (dtype.itemsize + 12) * (2 if mode == "second order" else 1),
        moved=touched * logits * dtype.itemsize,
        mutating=frozenset({"liger"}),  # it writes the gradient over the logits
        tier=tier,
    )
