"""Weight decay for any optimizer, without biases and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hybridengine.plugin import ParamGroup, Run, Traits, hook, parameter

__all__ = ["WeightDecay"]


@dataclass(eq=False)
class WeightDecay:
    """Decays matrices by `value`, and biases, norm weights and other tensors below two dimensions not at all.

    Maths: the optimizer's own decay term, θ ← θ − η·value·θ for AdamW, is set for each group of parameters. A scale
    or an offset near its useful value has no reason to be pulled to 0.

    Paper: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    Hooks: `transform_param_groups`. Cost: none. Combines with everything; it overrides `adamw: {weight_decay}`.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        paper="Loshchilov and Hutter 2019, arXiv:1711.05101",
        combines="any optimizer that has a weight_decay option",
    )

    value: float = parameter(0.01, "decay of matrices", ge=0)

    @hook
    def transform_param_groups(self, run: Run, groups: list[ParamGroup]) -> list[ParamGroup]:
        """Split each group into decayed matrices and undecayed rest."""
        split = []
        for group in groups:
            matrices = {k: p for k, p in group.parameters.items() if p.dim() >= 2}
            others = {k: p for k, p in group.parameters.items() if p.dim() < 2}
            for parameters, value in ((matrices, self.value), (others, 0.0)):
                if parameters:
                    split.append(ParamGroup(parameters, **{**group.options, "weight_decay": value}))
        return split
