"""Gradient noise: annealed Gaussian noise on the gradient of every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work

__all__ = ["GradientNoise"]


@dataclass(eq=False)
class GradientNoise:
    """Add noise to the gradient of the step; it dies out while training goes on.

        gradient += N(0, eta / (1 + t)^gamma)        in step t

    The noise is keyed by (seed, step, parameter), so a resumed run draws the same.

    Paper: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep Networks".
    Hook: `wrap_gradient`. Cost: one random number per trained weight.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.GRADIENT,
        effect="noise_norm",
        paper="Neelakantan et al. 2015, arXiv:1511.06807",
    )

    eta: float = parameter(0.01, "variance of the noise in the first step", gt=0)
    gamma: float = parameter(0.55, "how fast it dies out", ge=0)

    @hook
    def wrap_gradient(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The gradient of all micro-batches, then noise on top."""
        terms = inner(ctx, works)
        size = (self.eta / (1 + ctx.run.step) ** self.gamma) ** 0.5
        noise = {}
        for name, weight in ctx.run.optimised().items():
            # One row of random numbers per parameter, as long as the parameter.
            drawn = ctx.rng(f"gradient-noise/{name}", [0]).normal(weight.numel())
            noise[name] = size * drawn.view_as(weight).to(weight)
        ctx.add_grads(noise)
        ctx.report(self, noise_norm=torch.nn.utils.get_total_norm(list(noise.values())))
        return terms
