"""The warmup-stable-decay schedule: up, flat, and down in the last part of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.optim.lr_scheduler import LambdaLR

from hybridengine.plugin import Run, Traits, check_share, hook, parameter, whole_steps

__all__ = ["WSD"]


@dataclass(eq=False)
class WSD:
    """Warms the learning rate up linearly, keeps it, and lowers it to `floor` of the peak in the last steps.

    Maths: with W warm-up and D decay steps of T, the update of step t = 0..T−1 uses η·(t+1)/W for t < W, η until
    T − D, and then η·(floor + (1 − floor)·(1 − f(x))), x = (t − (T − D))/D, with f(x) = x (linear) or √x (sqrt, which
    Hägele et al. found better than linear). A run that is continued from before the decay needs no other schedule than
    a shorter one.

    Papers: Hu et al. 2024, "MiniCPM"; Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations".
    Hooks: `build_scheduler`. Cost: none. Combines with everything but other schedules.
    """

    name: ClassVar[str] = "wsd"
    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("scheduler",),
        paper="Hu et al. 2024, arXiv:2404.06395; Hägele et al. 2024, arXiv:2405.18392",
        combines="everything except other schedules",
    )

    warmup: int | float = parameter(0.06, "share of all steps below 1, or a whole number of steps", ge=0)
    decay: int | float = parameter(0.2, "length of the decay: share of all steps below 1, or whole steps", ge=0)
    shape: Literal["linear", "sqrt"] = parameter("sqrt", "how the rate falls: straight, or as 1 minus the square root")
    floor: float = parameter(0.0, "share of the peak rate that is left at the end", ge=0, le=1)

    def __post_init__(self) -> None:
        check_share("warmup", self.warmup)
        check_share("decay", self.decay)

    @hook
    def build_scheduler(self, run: Run, optimizer: Any) -> LambdaLR:
        """Scale every group's own rate; the warm-up comes first where the run is too short for both."""
        total = run.total_steps
        warm = whole_steps(self.warmup, total)
        falling = min(whole_steps(self.decay, total), total - warm)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            done = min(1.0, max(0.0, step - (total - falling)) / max(1, falling))
            return self.floor + (1 - self.floor) * (1 - (done if self.shape == "linear" else math.sqrt(done)))

        return LambdaLR(optimizer, factor)
