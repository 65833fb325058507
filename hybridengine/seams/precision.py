"""Number formats of the forward pass, and the loss scale that fp16 needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LossScale", "Precision", "choose_precision", "wide"]


def wide(value: Tensor) -> Tensor:
    """The tensor in at least fp32; itself where it is that already."""
    return value if value.dtype == torch.float64 else value.float()


@dataclass(frozen=True)
class Precision:
    """What each forward computes in: `dtype` None means the parameters' own."""

    name: str
    dtype: torch.dtype | None
    reason: str = ""

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """The autocast of one forward.

        The cast cache is off: weights that moved (SAM, functional parameters) would be read in their old cast.
        An outer autocast of the caller is replaced, never inherited.
        """
        if self.dtype is None and not torch.is_autocast_enabled(device.type):
            return contextlib.nullcontext()  # nothing to switch off, and a pass costs 15 microseconds less
        enabled = self.dtype is not None
        return torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=enabled, cache_enabled=False)


class LossScale:
    """Dynamic loss scale for fp16: grows after `interval` finite steps, halves on overflow; 1 for other formats.

    It stays at 1 or above: gradients that overflow unscaled are no matter of the scale.
    """

    def __init__(self, initial: float = 1.0, interval: int = 2000) -> None:
        self.value = initial
        self.dynamic = initial != 1.0
        self.interval = interval
        self.finite_steps = 0

    @property
    def can_shrink(self) -> bool:
        """Whether a smaller scale is left to try after an overflow."""
        return self.dynamic and self.value >= 2

    def update(self, finite: bool) -> None:
        """Adapt after a step; without a dynamic scale nothing happens."""
        if not self.dynamic:
            return
        if not finite:
            self.value, self.finite_steps = max(self.value / 2, 1.0), 0
        elif (steps := self.finite_steps + 1) >= self.interval:
            self.value, self.finite_steps = self.value * 2, 0
        else:
            self.finite_steps = steps

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "finite_steps": float(self.finite_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.finite_steps = float(state["value"]), int(state["finite_steps"])


def _native_bfloat16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return capable, "the GPU computes bf16 natively" if capable else "the GPU is older than sm_80"
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        probe = getattr(torch.cpu, name, None)
        if probe is not None and probe():
            return True, "the CPU has bf16 instructions"
    return False, "the CPU has no bf16 instructions"


def choose_precision(wish: str, device: torch.device) -> tuple[Precision, LossScale]:
    """Turn `auto | fp32 | bf16 | fp16` into a format and its loss scale; `auto` says why it chose."""
    if wish == "auto":
        capable, reason = _native_bfloat16(device)
        wish = "bf16" if capable else "fp32"
    else:
        reason = "asked for"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[wish]
    return Precision(wish, dtype, reason), LossScale(2.0**16 if wish == "fp16" else 1.0)
