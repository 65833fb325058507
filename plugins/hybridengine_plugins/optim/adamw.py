"""AdamW, the default optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hybridengine.plugin import ParamGroup, Run, Traits, hook, parameter

__all__ = ["AdamW"]


@dataclass(eq=False)
class AdamW:
    """Adam with decoupled weight decay, in torch's fused form where the device has it.

    Maths: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← θ − η(m̂/(√v̂ + ε) + λθ). λ applies to matrices; biases, norm
    weights and other tensors of fewer than two dimensions are not decayed, unless a method says otherwise for a group.

    Paper: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    Hooks: `build_optimizer`. Cost: two moments per trained parameter. Combines with everything but other optimizers.
    """

    name: ClassVar[str] = "adamw"
    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("optimizer",),
        cost="two moments per trained parameter",
        state=2,
        paper="Loshchilov and Hutter 2019, arXiv:1711.05101",
        combines="everything except other optimizers",
    )

    betas: tuple[float, float] = parameter((0.9, 0.999), "decay of the first and second moment")
    eps: float = parameter(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = parameter(0.01, "decay of matrices", ge=0)
    fused: bool | None = parameter(None, "one kernel for the whole update; by default wherever the device has it")

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {tuple(self.betas)}")

    @hook
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Groups may override `lr` and `weight_decay`."""
        entries = [entry for group in groups for entry in group.with_undecayed_vectors()]
        parameters = [p for entry in entries for p in entry["params"]]
        fused = _has_fused(parameters) if self.fused is None else self.fused
        betas = (float(self.betas[0]), float(self.betas[1]))
        return torch.optim.AdamW(
            entries, lr=run.config.train.lr, betas=betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused
        )


def _has_fused(parameters: list[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
