"""The linear schedule, the default one: warm-up, then straight down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim.lr_scheduler import LambdaLR

from hybridengine.plugin import Run, Traits, check_share, hook, parameter, whole_steps

__all__ = ["Linear"]


@dataclass(eq=False)
class Linear:
    """Warms the learning rate up linearly, then lowers it linearly to `floor` of the peak.

    Maths: with W warm-up steps of T, the update of step t = 0..T−1 uses η·(t+1)/W for t < W, then
    η·(floor + (1 − floor)·(T − t)/(T − W)). No update is wasted at rate 0: the first uses η/W, the last η/(T − W).

    Hooks: `build_scheduler`. Cost: none. Combines with everything but other schedules.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim", slots=("scheduler",), combines="everything except other schedules"
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
            left = max(0.0, (total - step) / max(1, total - warm))
            return self.floor + (1 - self.floor) * left

        return LambdaLR(optimizer, factor)
