"""GaLore: Adam in a low-rank subspace of each matrix's gradient, every weight still trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import GroupwiseOptimizer, ParamGroup, Run, Traits, hook, parameter, split_hidden

__all__ = ["GaLore", "GaLoreAdamW"]


@dataclass(eq=False)
class GaLore:
    """AdamW whose moments live in the leading directions of each matrix's gradient: full tuning with little state.

    Maths: for a matrix with gradient G (m×n, m ≤ n), every `refresh` steps P = the first `rank` left singular vectors
    of G; R = PᵀG; Adam's step N of R, and θ ← θ − η λ θ − η · scale · P N. Wide matrices project from the left, tall
    ones from the right. Moments are kept over a refresh, as in the authors' code; since the sign of a singular vector
    is arbitrary, each new direction points the way of the one that it follows, or momentum would be turned round by
    chance. Vectors, embeddings, the task's head and matrices with at most `rank` rows or columns take plain AdamW
    steps.

    Paper: Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection".
    Hooks: `build_optimizer`. Cost: 2·rank·n + rank·m numbers of state a matrix where AdamW keeps 2·m·n; a singular
    value decomposition of every matrix each `refresh` steps. Combines with everything but other optimizers; with
    `lora`, whose matrices are small already, it changes nothing.
    """

    name: ClassVar[str] = "galore"
    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("optimizer",),
        cost="state of a few ranks of each matrix; a singular value decomposition each `refresh` steps",
        state=0.5,  # rank 128 at 768 rows: 2 moments and a projection of a sixth each
        paper="Zhao et al. 2024, arXiv:2403.03507",
        combines="everything except other optimizers; useless with lora",
    )

    rank: int = parameter(128, "directions kept of each matrix's gradient", ge=1)
    refresh: int = parameter(200, "optimizer steps between choices of the directions", ge=1)
    scale: float = parameter(0.25, "factor of the projected steps", gt=0)
    beta1: float = parameter(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = parameter(0.999, "decay of the second moment", ge=0, lt=1)
    eps: float = parameter(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = parameter(0.01, "decoupled decay of matrices", ge=0)

    @hook
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Groups may override `lr` and `weight_decay`."""
        split = list(split_hidden(run, groups, lambda matrix: min(matrix.shape) > self.rank))
        entries = [{**entry, "rank": self.rank if hidden else 0} for entry, hidden in split]
        if not any(hidden for _, hidden in split):
            run.say(f"galore: no trained matrix is larger than rank {self.rank}, so every step is plain AdamW's")
        defaults = {"lr": run.config.train.lr, "weight_decay": self.weight_decay, "betas": (self.beta1, self.beta2)}
        return GaLoreAdamW(entries, **defaults, eps=self.eps, refresh=self.refresh, scale=self.scale)


class GaLoreAdamW(GroupwiseOptimizer):
    """AdamW with projected moments in groups whose `rank` is above 0.

    Args:
        entries: parameter groups, each with `rank`.
        defaults: `lr`, `weight_decay`, `betas`, `eps`, `refresh` (steps), `scale`.
    """

    def move(self, group: dict[str, Any]) -> None:
        """Each parameter by itself."""
        for value in group["params"]:
            if value.grad is not None:
                self._move(value, value.grad, group)

    def _move(self, value: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[value]
        step = state["step"] = state.get("step", 0) + 1
        wide = value.dim() == 2 and value.shape[0] <= value.shape[1]
        if group["rank"]:
            if (step - 1) % group["refresh"] == 0:
                state["directions"] = _directions(gradient, group["rank"], wide, state.get("directions"))
            directions = state["directions"]
            gradient = directions.T @ gradient if wide else gradient @ directions
        if step == 1:
            state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        first = state["first"].lerp_(gradient, 1 - beta1)
        second = state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = first / (1 - beta1**step) / (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        if group["rank"]:
            update = group["scale"] * (directions @ update if wide else update @ directions.T)
        value.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _directions(gradient: Tensor, rank: int, wide: bool, before: Tensor | None) -> Tensor:
    """The leading left (wide) or right (tall) singular vectors, as columns that point the way of those before."""
    left, _, right = torch.linalg.svd(gradient if gradient.dtype == torch.float64 else gradient.float(), False)
    found = (left[:, :rank] if wide else right[:rank].T).to(gradient.dtype)
    if before is not None:
        found = torch.where((found * before).sum(0) < 0, -found, found)
    return found.contiguous()
