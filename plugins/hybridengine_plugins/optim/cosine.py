"""The cosine schedule: warm-up, then half a cosine down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim.lr_scheduler import LambdaLR

from hybridengine.plugin import Run, Traits, check_share, hook, parameter, whole_steps

__all__ = ["Cosine"]


@dataclass(eq=False)
class Cosine:
    """Warms the learning rate up linearly, then lowers it along half a cosine to `floor` of the peak.

    Maths: with W warm-up steps of T, the update of step t = 0..T−1 uses η·(t+1)/W for t < W, then
    η·(floor + (1 − floor)·½(1 + cos(π·(t − W)/(T − W)))).

    Paper: Loshchilov and Hutter 2017, "SGDR" (without restarts).
    Hooks: `build_scheduler`. Cost: none. Combines with everything but other schedules.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("scheduler",),
        paper="Loshchilov and Hutter 2017, arXiv:1608.03983",
        combines="everything except other schedules",
    )

    warmup: int | float = parameter(0.06, "share of all steps below 1, or a whole number of steps", ge=0)
    floor: float = parameter(0.0, "share of the peak rate that is left at the end", ge=0, le=1)

    def __post_init__(self) -> None:
        check_share("warmup", self.warmup)

    @hook
    def build_scheduler(self, run: Run, optimizer: Any) -> LambdaLR:
        """Scale every group's own rate."""
        total = run.total_steps
        warm = whole_steps(self.warmup, total)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            done = min(1.0, (step - warm) / max(1, total - warm))
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))

        return LambdaLR(optimizer, factor)
