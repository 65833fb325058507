"""EMA: evaluate the running average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Average, Context, Work

__all__ = ["EMA"]

_MEASURE_EVERY = 10  # steps between measurements of the distance, each a pass over all weights


@dataclass(eq=False)
class EMA:
    """Keep an exponential moving average of the trainable weights and evaluate, save and predict with it.

    After optimizer step t (from 0):

        d = min(decay, (1 + t) / (10 + t))
        shadow <- d shadow + (1 - d) w

    The warm-up of d lets the average forget the starting point. The average is kept in at least fp32 and in
    checkpoints; weights that a schedule thaws later join it then. Training itself is unchanged.

    Hooks: `wrap_step`, `wrap_evaluation`. Default: decay 0.999 averages about the last thousand steps; take 0.99 for
    short runs.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.AVERAGE,
        slots=("weight_average",),
        effect="distance",
        cost="no extra passes; a copy of the trainable weights, and a pass over them per step",
        state=1,
        paper="Polyak, Juditsky: Acceleration of Stochastic Approximation by Averaging, 1992; Tarvainen, Valpola, 2017",
        combines="everything but swa",
    )

    decay: float = parameter(0.999, "how much of the average survives a step", ge=0, lt=1)

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step, then the average follows the moved weights."""
        average, step = Average(ctx.run, "ema"), ctx.run.step
        average.join()
        terms = inner(ctx, works)
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        average.follow(rate=rate)
        if step % _MEASURE_EVERY == 0:
            apart = [average.values[name] - weight for name, weight in average.join().items()]
            ctx.report(self, distance=torch.nn.utils.get_total_norm(apart))
        return terms

    @hook
    def wrap_evaluation(self, ctx: Context) -> AbstractContextManager[Any]:
        """The average stands in for the weights."""
        shadow, weights = ctx.run.state("ema"), ctx.run.optimised()
        return ctx.swapped({name: average for name, average in shadow.items() if name in weights})
