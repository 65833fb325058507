"""Adafactor: adaptive rates whose memory is two vectors per matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hybridengine.plugin import ParamGroup, Run, Traits, hook, parameter

__all__ = ["Adafactor"]


@dataclass(eq=False)
class Adafactor:
    """Steps relative to each tensor's own size, with factored second moments; torch's own.

    Maths: with β = 1 − t^beta2_decay, R and C the running means of g² over columns and rows of a matrix (for vectors V
    itself), V = R Cᵀ / mean(R), u = g/√V and u ← u / max(1, RMS(u)/clip):

        θ ← θ − η λ θ − max(min_size, RMS(θ)) · min(η, 1/√t) · u

    So `train.lr` is a share of a tensor's size, not a length: start at 1e-3. A tensor near zero, such as a new head's
    bias, moves by no more than min_size · η; raise `min_size` where such tensors must learn. λ applies to matrices
    alone.

    Paper: Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost".
    Hooks: `build_optimizer`. Cost: two vectors per matrix, where AdamW keeps two matrices. Combines with everything but
    other optimizers.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        slots=("optimizer",),
        cost="two vectors per trained matrix",
        paper="Shazeer and Stern 2018, arXiv:1804.04235",
        combines="everything except other optimizers",
    )

    beta2_decay: float = parameter(-0.8, "exponent by which the second moment's memory grows", lt=0)
    min_size: float = parameter(1e-3, "least size of a tensor that steps are relative to", gt=0)
    clip: float = parameter(1.0, "root mean square above which an update is scaled down", ge=1)
    weight_decay: float = parameter(0.0, "decay of matrices", ge=0)

    @hook
    def build_optimizer(self, run: Run, groups: list[ParamGroup]) -> torch.optim.Optimizer:
        """Groups may override `lr` and `weight_decay`."""
        return torch.optim.Adafactor(
            [entry for group in groups for entry in group.with_undecayed_vectors()],
            lr=run.config.train.lr,
            beta2_decay=self.beta2_decay,
            eps=(None, self.min_size),
            d=self.clip,
            weight_decay=self.weight_decay,
        )
