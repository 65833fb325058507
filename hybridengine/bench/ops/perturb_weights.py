"""Cases of the move of all weights by SAM or ASAM, and of the way back to the bit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.bench.case import OURS, Case, Tensors, label

__all__ = ["KERNEL", "cases"]

KERNEL = "perturb_weights"

RADIUS, SIZE_OF_ZERO = 0.05, 0.01


def ours(weights: list[Tensor], gradients: list[Tensor], *, adaptive: bool) -> Tensor:
    """The kernel; the norm tells whether it measured right."""
    rule = "asam" if adaptive else "sam"
    with kernels.perturb_weights(weights, gradients, rho=RADIUS, rule=rule, eta=SIZE_OF_ZERO) as moved:  # type: ignore[arg-type]
        return torch.tensor(moved.norm)


def foreach(weights: list[Tensor], gradients: list[Tensor], *, adaptive: bool) -> Tensor:
    """The recipe in torch's multi-tensor functions."""
    saved = [weight.clone() for weight in weights]
    sizes = torch._foreach_add(torch._foreach_abs(weights), SIZE_OF_ZERO) if adaptive else ()
    measured = list(torch._foreach_mul(sizes, gradients)) if adaptive else gradients
    norm = torch.nn.utils.get_total_norm(measured)
    rate = RADIUS / float(norm)
    if adaptive:
        torch._foreach_mul_(measured, sizes)
        torch._foreach_mul_(measured, rate)
        torch._foreach_add_(weights, measured)
    else:
        torch._foreach_add_(weights, gradients, alpha=rate)
    torch._foreach_copy_(weights, saved)
    return norm


def make(rows: int, device: torch.device, *, layers: int, vocabulary: int, dtype: torch.dtype) -> Tensors:
    """An encoder `rows` wide: embeddings, and for each layer matrices and vectors."""
    generator = torch.Generator(device).manual_seed(0)
    layer = [(rows, rows)] * 4 + [(rows,)] * 9 + [(4 * rows, rows), (4 * rows,), (rows, 4 * rows)]
    shapes = [(vocabulary, rows), (512, rows), (rows,), (rows,), *layer * layers]
    both = [[torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes] for _ in range(2)]
    return {"weights": both[0], "gradients": both[1]}


def cases(device: str) -> list[Case]:
    """The cases of a device."""
    return [_case(rule, 384, 6, tier) for rule, tier in (("SAM", "quick"), ("ASAM", "default"))]


def _case(rule: str, width: int, layers: int, tier: str) -> Case:
    dtype, adaptive, vocabulary = torch.float32, rule == "ASAM", 30522
    elements = (vocabulary + 512) * width + layers * 12 * width * width
    return Case(
        label=f"{rule} {label(dtype, (width,), 'forward+backward')} wide, {layers} layers",
        facts={"rule": rule, "width": width, "layers": layers, "dtype": "float32"},
        dtype=dtype,
        mode="forward",
        rows=width,
        width=1,  # float64 takes all of it
        make=partial(make, layers=layers, vocabulary=vocabulary, dtype=dtype),
        wanted=(),
        functions={OURS: partial(ours, adaptive=adaptive), "torch": partial(foreach, adaptive=adaptive)},
        memory=3 * elements * dtype.itemsize,
        # The norm reads the gradients; the move reads both, writes weights and copy; the way back reads and writes.
        moved=(1 + 2 + 2 + 2) * elements * dtype.itemsize,
        tier=tier,  # type: ignore[arg-type]
    )
