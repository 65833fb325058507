"""SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hybridengine.plugin import ParamGroup, Run, Traits, hook, parameter

__all__ = ["SGD"]


@dataclass(eq=False)
class SGD:
    """Stochastic gradient descent with momentum, torch's own.

    Maths: m ← μm + g + λθ, θ ← θ − ηm (Nesterov: θ ← θ − η(g + λθ + μm)). λ applies to matrices alone, and through the
    gradient, as an L2 penalty. It needs far larger rates than Adam: start at `train.lr: 0.01`.

    Paper: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    Hooks: `build_optimizer`. Cost: one copy of the trained parameters, none without momentum. Combines with everything
    but other optimizers; the natural outer step of `reptile`, which at rate β then moves by β of the way.
    """

    name: ClassVar[str] = "sgd"
    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("optimizer",),
        cost="one copy of the trained parameters",
        state=1,
        paper="Sutskever et al. 2013, ICML",
        combines="everything except other optimizers",
    )

    momentum: float = parameter(0.9, "decay of the velocity; 0 is plain gradient descent", ge=0, lt=1)
    nesterov: bool = parameter(False, "look ahead along the velocity")
    weight_decay: float = parameter(0.0, "L2 penalty on matrices", ge=0)

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the velocity, so it needs a momentum above 0")

    @hook
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Groups may override `lr` and `weight_decay`."""
        entries = [entry for group in groups for entry in group.with_undecayed_vectors()]
        return torch.optim.SGD(
            entries,
            lr=run.config.train.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )
