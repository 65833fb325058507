"""SWA: evaluate the plain average of the weights along the last part of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work, wide

__all__ = ["SWA"]

_MEASURE_EVERY = 10  # steps between measurements of the distance, each a pass over all weights


@dataclass(eq=False)
class SWA:
    """Average the weights after every `every`-th step from `start` on, all alike; evaluate, save and predict with it.

    After the n-th averaged step (from 0), for each weight:

        average ← average + (w − average) / (n + 1)

    Averaging pays where the weights keep wandering, so the rate should not go to 0: combine it with `constant`, `wsd`
    or a `floor`. Transformers have no batch statistics to estimate again afterwards. The average is kept in at least
    fp32 and in checkpoints; before `start`, evaluation sees the weights themselves, and training itself is unchanged.

    Hooks: `wrap_step`, `wrap_evaluation`. Take for `start` about three quarters of the run's steps.
    """

    name: ClassVar[str] = "swa"
    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.AVERAGE,
        slots=("weight_average",),
        effect="distance",
        cost="no extra passes; a copy of the trainable weights, and a pass over them every `every` steps",
        state=1,
        paper="Izmailov et al.: Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018",
        combines="everything but ema; best with a rate that stays high",
    )

    start: int = parameter(help="first optimizer step after which weights are averaged", ge=0, example=300)
    every: int = parameter(1, "optimizer steps between two averaged weights", ge=1)

    def active(self, step: int) -> bool:
        """Whether the average is kept at this step."""
        return step >= self.start

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step, then the average takes the moved weights in."""
        terms = inner(ctx, works)
        average, since = ctx.run.state("swa"), ctx.run.step - self.start
        weights = {name: weight.detach() for name, weight in ctx.run.optimised().items()}
        if since % self.every == 0:
            for name in weights.keys() - average.keys():
                average[name] = wide(weights[name]).clone()
            rate = 1 / (since // self.every + 1)
            kernels.ema_update([average[name] for name in weights], list(weights.values()), rate=rate)
        if since % _MEASURE_EVERY == 1:  # at 0 the average is the weights
            apart = [average[name] - weight for name, weight in weights.items() if name in average]
            ctx.report(self, distance=torch.nn.utils.get_total_norm(apart))
        return terms

    @hook
    def wrap_evaluation(self, ctx: Context) -> AbstractContextManager[Any]:
        """The average stands in for the weights that it holds."""
        average, weights = ctx.run.state("swa"), ctx.run.optimised()
        return ctx.swapped({name: value for name, value in average.items() if name in weights})
