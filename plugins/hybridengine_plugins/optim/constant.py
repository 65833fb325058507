"""The constant schedule, with warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim.lr_scheduler import LambdaLR

from hybridengine.plugin import Run, Traits, check_share, hook, parameter, whole_steps

__all__ = ["Constant"]


@dataclass(eq=False)
class Constant:
    """Warms the learning rate up linearly, then keeps it.

    Maths: with W warm-up steps, the update of step t uses η·min(1, (t+1)/W).

    Hooks: `build_scheduler`. Cost: none. Combines with everything but other schedules; `ema` likes it.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim", slots=("scheduler",), combines="everything except other schedules"
    )

    warmup: int | float = parameter(0.06, "share of all steps below 1, or a whole number of steps", ge=0)

    def __post_init__(self) -> None:
        check_share("warmup", self.warmup)

    @hook
    def build_scheduler(self, run: Run, optimizer: Any) -> LambdaLR:
        """Scale every group's own rate."""
        total = run.total_steps
        warm = whole_steps(self.warmup, total)
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warm)))
