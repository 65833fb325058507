"""Full tuning: every parameter of the model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hybridengine.plugin import Band, Run, Traits, hook

__all__ = ["Full"]


@dataclass(eq=False)
class Full:
    """Trains every parameter of the model: the default of an empty stack, said aloud.

    Maths: θ ← θ − η·∇L(θ) for all of θ. It takes the slot `backbone`, so that it cannot be combined with an adapter
    that freezes the backbone (`lora`); `freeze` may take layers away from it again.

    Hooks: `transform_model`. Cost: a plain step. Combines with everything but adapters.
    """

    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.LEAF,
        slots=("backbone",),
        cost="a plain step: forward 1, backward 2",
        combines="everything except lora and other adapters",
    )

    @hook
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Let every parameter require a gradient."""
        return model.requires_grad_(True)
