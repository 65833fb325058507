"""Cases of one step of an embedding attack: FGM's, without projection, and PGD's, with it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Tensors, Tier, label

__all__ = ["KERNEL", "cases"]

KERNEL = "perturb_step"

ATTACKS: dict[str, float | None] = {"FGM": None, "PGD": 1.0}


def ours(delta: Tensor, gradient: Tensor, mask: Tensor, *, epsilon: float | None) -> Tensor:
    """The kernel."""
    return kernels.perturb_step(delta, gradient, mask, step_size=1.0, epsilon=epsilon)


def eager(delta: Tensor, gradient: Tensor, mask: Tensor, *, epsilon: float | None) -> Tensor:
    """One step as attacks usually write it, without reading the norm back to the host."""
    g = gradient * mask.unsqueeze(-1)
    moved: Tensor = delta + g / (g.flatten(1).norm(dim=1).view(-1, 1, 1) + 1e-12)
    if epsilon is None:
        return moved
    size = moved.flatten(1).norm(dim=1).view(-1, 1, 1)
    projected: Tensor = moved * (epsilon / (size + 1e-12)).clamp(max=1.0)
    return projected


def make(rows: int, device: torch.device, *, length: int, width: int, dtype: torch.dtype) -> Tensors:
    """A batch of texts of different lengths."""
    generator = torch.Generator(device).manual_seed(0)
    ends = torch.randint(length // 8, length + 1, (rows, 1), device=device, generator=generator)
    mask = torch.arange(length, device=device) < ends
    # The first start of an attack is smaller than a step.
    delta = 0.01 * torch.randn(rows, length, width, device=device, generator=generator) * mask.unsqueeze(-1)
    gradient = torch.randn(rows, length, width, device=device, generator=generator)
    return {"delta": delta.to(dtype), "gradient": gradient.to(dtype), "mask": mask}


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    batch, full = (32, (64, 128)) if device == "cpu" else (128, (256, 512))
    single, half = torch.float32, torch.bfloat16
    # On a GPU a small batch measures what a call costs the host; as many numbers as 128 texts of 1024 tokens fill it.
    large = () if device == "cpu" else (single, half)
    return [
        *(_case(attack, 1024, dtype, "default") for attack in ATTACKS for dtype in large),
        *(_case(attack, batch, single, "quick") for attack in ATTACKS),
        *(_case(attack, batch, half, "default") for attack in ATTACKS),
        *(_case(attack, rows, dtype, "full") for attack in ATTACKS for rows in full for dtype in (single, half)),
    ]


def _case(attack: str, rows: int, dtype: torch.dtype, tier: Tier) -> Case:
    length, width, epsilon = 128, 768, ATTACKS[attack]
    return Case(
        label=f"{attack} {label(dtype, (rows, length, width), 'forward+backward')}",
        facts={"attack": attack, "shape": [rows, length, width], "dtype": str(dtype).removeprefix("torch.")},
        dtype=dtype,
        mode="forward",
        rows=rows,
        width=length * width,
        make=partial(make, length=length, width=width, dtype=dtype),
        wanted=(),
        functions={OURS: partial(ours, epsilon=epsilon), "torch": partial(eager, epsilon=epsilon)},
        memory=rows * length * width * dtype.itemsize * 6,
        tier=tier,
    )
