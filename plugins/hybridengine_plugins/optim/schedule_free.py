"""Schedule-free AdamW: an average of the weights in place of a falling rate."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hybridengine.plugin import (
    Band,
    GroupwiseOptimizer,
    ParamGroup,
    Run,
    Traits,
    check_share,
    hook,
    parameter,
    whole_steps,
)
from hybridengine.seams import Context

__all__ = ["ScheduleFree", "ScheduleFreeAdamW"]


@dataclass(eq=False)
class ScheduleFree:
    """AdamW that needs no end of training: gradients at y between the iterate z and its average x; x is what counts.

    Maths: y = (1 − β₁) z + β₁ x; with g at y, v ← β₂ v + (1 − β₂) g², d = g/(√(v/(1 − β₂ᵗ)) + ε) + λ y:
    z ← z − η d, x ← (1 − c) x + c z, c = η²/Σ η². The rate stays flat after its warm-up, and every evaluation is as
    good as if the schedule ended there. Training moves y; evaluating, saving and predicting see x.

    Paper: Defazio et al. 2024, "The Road Less Scheduled".
    Hooks: `build_optimizer`, `build_scheduler`, `wrap_evaluation`. Cost: as AdamW. Rates are 1 to 10 times AdamW's.
    Combines with everything but other optimizers, schedules and averages of the weights.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        order=Band.AVERAGE,
        slots=("optimizer", "scheduler", "weight_average"),
        cost="two copies of the trained parameters, as AdamW",
        state=2,
        paper="Defazio et al. 2024, arXiv:2405.15682",
        combines="everything except other optimizers, schedules and weight averages",
    )

    beta1: float = parameter(0.9, "where gradients are taken: 1 is the average, 0 the iterate", gt=0, lt=1)
    beta2: float = parameter(0.999, "decay of the second moment", ge=0, lt=1)
    eps: float = parameter(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = parameter(0.01, "decoupled decay of matrices", ge=0)
    warmup: int | float = parameter(0.06, "share of all steps below 1, or a whole number of steps", ge=0)

    def __post_init__(self) -> None:
        check_share("warmup", self.warmup)

    @hook
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Groups may override `lr` and `weight_decay`."""
        entries = [entry for group in groups for entry in group.with_undecayed_vectors()]
        defaults = {"lr": run.config.train.lr, "weight_decay": self.weight_decay, "eps": self.eps}
        return ScheduleFreeAdamW(entries, **defaults, betas=(self.beta1, self.beta2))

    @hook
    def build_scheduler(self, run: Run, optimizer: Any) -> LambdaLR:
        """Warm up, then stay."""
        warm = max(1, whole_steps(self.warmup, run.total_steps))
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))

    @hook
    def wrap_evaluation(self, ctx: Context) -> AbstractContextManager[Any]:
        """The average stands in for the weights."""
        optimizer = ctx.run.optimizer
        if not isinstance(optimizer, ScheduleFreeAdamW):
            return ctx.swapped({})
        averages = {name: optimizer.average(weight) for name, weight in ctx.run.optimised().items()}
        return ctx.swapped({name: value for name, value in averages.items() if value is not None})


class ScheduleFreeAdamW(GroupwiseOptimizer):
    """Parameters hold y; `defaults` are `lr`, `weight_decay`, `betas` and `eps`."""

    def __init__(self, entries: Iterable[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(entries, weight_sum=0.0, step=0, **defaults)

    def average(self, value: Tensor) -> Tensor | None:
        """x of a parameter; None where it has not moved yet."""
        if value not in self.state:
            return None
        return torch.lerp(value.detach(), self.state[value]["z"], 1 - 1 / self.defaults["betas"][0])

    def move(self, group: dict[str, Any]) -> None:
        """Each parameter by itself, all by the group's share of the average."""
        group["step"] += 1
        group["weight_sum"] += group["lr"] ** 2
        share = group["lr"] ** 2 / group["weight_sum"] if group["weight_sum"] else 0.0
        for value in group["params"]:
            if value.grad is not None:
                self._move(value, value.grad, group, share)

    def _move(self, value: Tensor, gradient: Tensor, group: dict[str, Any], share: float) -> None:
        state, (beta1, beta2) = self.state[value], group["betas"]
        if not state:
            state.update(z=value.clone(), second=torch.zeros_like(value))
        second = state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        way = gradient / (second / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        way.add_(value, alpha=group["weight_decay"])
        # y follows from x and z: both moves at once, without keeping x.
        value.lerp_(state["z"], share).add_(way, alpha=group["lr"] * (beta1 * (1 - share) - 1))
        state["z"].sub_(way, alpha=group["lr"])
