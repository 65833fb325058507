"""Muon: steps of matrices with all singular values alike; AdamW for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import GroupwiseOptimizer, ParamGroup, Run, Traits, hook, parameter, split_hidden

__all__ = ["Muon", "MuonAdamW"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration's polynomial: steep at 0, within [0.7, 1.2] near 1


@dataclass(eq=False)
class Muon:
    """Replaces each matrix's momentum by the nearest matrix with orthonormal rows or columns: no direction dominates.

    Maths: m ← μ m + (1 − μ) g, u = (1 − μ) g + μ m, O ≈ U Vᵀ of u = U S Vᵀ by five Newton-Schulz steps in bfloat16,
    θ ← θ − η λ θ − η · 0.2 √max(rows, columns) · O. The factor gives O the root mean square of an AdamW step, so that η
    may stay what it is for AdamW. Vectors, embeddings and the task's head take AdamW steps.

    Paper: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
    Scalable for LLM Training" (the factor).
    Hooks: `build_optimizer`. Cost: one copy of the matrices (AdamW: two); 15 products a step and matrix. Combines
    with everything but other optimizers.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("optimizer",),
        cost="one copy of the trained matrices, two of the rest; some products of matrices a step",
        state=1.5,
        paper="Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982",
        combines="everything except other optimizers",
    )

    momentum: float = parameter(0.95, "decay of the momentum", ge=0, lt=1)
    beta1: float = parameter(0.9, "AdamW's decay of the first moment", ge=0, lt=1)
    beta2: float = parameter(0.999, "AdamW's decay of the second moment", ge=0, lt=1)
    weight_decay: float = parameter(0.01, "decoupled decay of matrices", ge=0)

    @hook
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Groups may override `lr` and `weight_decay`."""
        entries = [{**entry, "orthogonal": hidden} for entry, hidden in split_hidden(run, groups)]
        defaults = {"lr": run.config.train.lr, "weight_decay": self.weight_decay, "momentum": self.momentum}
        return MuonAdamW(entries, **defaults, betas=(self.beta1, self.beta2), eps=1e-8)


class MuonAdamW(GroupwiseOptimizer):
    """Muon in groups that are `orthogonal`, AdamW in the others.

    Args:
        entries: parameter groups, each with `orthogonal`.
        defaults: `lr`, `weight_decay`, `momentum`, `betas`, `eps`.
    """

    def move(self, group: dict[str, Any]) -> None:
        """Each parameter by itself."""
        for value in group["params"]:
            if value.grad is not None:
                update = (self._orthogonal if group["orthogonal"] else self._adam)(value, value.grad, group)
                value.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _orthogonal(self, value: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[value]
        if not state:
            state["momentum"] = torch.zeros_like(value)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"])
        return _orthonormal(ahead).to(value.dtype) * (0.2 * max(value.shape) ** 0.5)

    def _adam(self, value: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[value]
        if not state:
            state.update(step=0, first=torch.zeros_like(value), second=torch.zeros_like(value))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first = state["first"].lerp_(gradient, 1 - beta1) / (1 - beta1 ** state["step"])
        second = state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return first / (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])


def _orthonormal(matrix: Tensor) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration; singular values end between 0.7 and 1.2, as is enough."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
