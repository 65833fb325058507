"""Launches the Triton kernel of `triton_rows`. Imported when it first runs: Triton takes a second.

One kernel is queued on the current stream, and nothing waits for it.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.kl_pair.derivatives import DIRECTIONS
from hybridengine.kernels.kl_pair.reference import REDUCTIONS, reduced
from hybridengine.kernels.kl_pair.triton_rows import kl_rows

__all__ = ["launch", "launch_options"]

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 2048


def launch_options(classes: int) -> dict[str, int]:
    """Return how many columns a program reads at once, and by how many warps."""
    block = min(max(triton.next_power_of_2(classes), _SMALLEST_BLOCK), _LARGEST_BLOCK)
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4 if block > 256 else 1}


def _guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' own is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _scale(a: Tensor, mask: Tensor | None, temperature: float, direction: int, reduction: int) -> Tensor:
    """Return what multiplies the gradients, on the device: nothing here waits for it."""
    factor = (0.5 if direction == DIRECTIONS["symmetric"] else 1.0) / temperature
    if reduction != REDUCTIONS["mean"]:
        return torch.full((), factor, dtype=torch.float32, device=a.device)
    if mask is None:
        return torch.full((), factor / max(a.shape[0], 1), dtype=torch.float32, device=a.device)
    return factor / mask.sum().clamp_min(1).float()


def launch(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    temperature: float,
    direction: int,
    reduction: int,
    empty_is_zero: bool,
    want_a: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's kernel; arguments and results as in its schema."""
    record("kl_pair", "triton")
    rows, classes = a.shape
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
    losses = torch.empty(rows, dtype=torch.float32, device=a.device)
    by_a = torch.empty((rows, classes) if want_a else (0,), dtype=a.dtype, device=a.device)
    by_b = torch.empty((rows, classes) if want_b else (0,), dtype=b.dtype, device=b.device)
    scale = _scale(a, mask, temperature, direction, reduction)
    sides = (a, b, by_a, by_b, want_a, want_b)
    if direction == DIRECTIONS["reverse"]:  # is forward with the two exchanged
        sides = (b, a, by_b, by_a, want_b, want_a)
    first, second, by_first, by_second, want_first, want_second = sides
    if rows:
        with _guard(a.device):
            kl_rows[(rows,)](
                first,
                second,
                losses if mask is None else mask.contiguous(),
                scale,
                losses,
                by_first,
                by_second,
                first.stride(0),
                second.stride(0),
                1.0 / temperature,
                CLASSES=classes,
                SYMMETRIC=direction == DIRECTIONS["symmetric"],
                WANT_A=want_first,
                WANT_B=want_second,
                HAS_MASK=mask is not None,
                **launch_options(classes),
            )
    return reduced(losses, mask, reduction, empty_is_zero), by_a, by_b
