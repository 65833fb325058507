"""Lion: steps of one size, in the direction of the sign of the momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hybridengine.plugin import GroupwiseOptimizer, ParamGroup, Run, Traits, hook, parameter

__all__ = ["Lion", "SignMomentum"]


@dataclass(eq=False)
class Lion:
    """Moves every weight by the same length, in the direction that gradient and momentum agree on.

    Maths: θ ← θ − η (sign(β₁ m + (1 − β₁) g) + λ θ), m ← β₂ m + (1 − β₂) g. All steps having one size, η is smaller
    than AdamW's by 3 to 10, and λ larger by as much; large batches suit it.

    Paper: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms".
    Hooks: `build_optimizer`. Cost: one copy of the trained parameters where AdamW keeps two. Combines with everything
    but other optimizers.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("optimizer",),
        cost="one copy of the trained parameters",
        state=1,
        paper="Chen et al. 2023, arXiv:2302.06675",
        combines="everything except other optimizers",
    )

    beta1: float = parameter(0.9, "share of the momentum in the direction of a step", ge=0, lt=1)
    beta2: float = parameter(0.99, "decay of the momentum", ge=0, lt=1)
    weight_decay: float = parameter(0.1, "decoupled decay of matrices", ge=0)

    @hook
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Groups may override `lr` and `weight_decay`."""
        entries = [entry for group in groups for entry in group.with_undecayed_vectors()]
        betas = (self.beta1, self.beta2)
        return SignMomentum(entries, lr=run.config.train.lr, weight_decay=self.weight_decay, betas=betas)


class SignMomentum(GroupwiseOptimizer):
    """Lion as a torch optimizer; `defaults` are `lr`, `weight_decay` and `betas`."""

    def move(self, group: dict[str, Any]) -> None:
        """By the sign of what gradient and momentum agree on."""
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = [p.grad for p in weights]
        momenta = [self.state[p]["momentum"] for p in weights]
        beta1, beta2 = group["betas"]
        signs = torch._foreach_sign(torch._foreach_lerp(momenta, gradients, 1 - beta1))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, signs, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)
