"""L2-SP: weights are pulled towards where they started, not towards zero."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work, wide

__all__ = ["L2SP"]

_MEASURE_EVERY = 10  # steps between measurements of the effect, each a pass over all weights


@dataclass(eq=False)
class L2SP:
    """Penalises the distance from the pretrained weights: what was known is kept unless the data speak against it.

        loss = L + alpha / 2 ||w - w_0||^2 + beta / 2 ||h||^2,    w_0 the weights at the first step, h a new head

    The penalty's gradient, alpha (w - w_0) and beta h, is added once a step, whatever the number of micro-batches; the
    reported loss is L alone. Set `weight_decay: 0` of the optimizer, or it pulls the other way. With Adam the pull is
    divided by the root of the second moment, as an L2 penalty's is. A copy of the start is kept in checkpoints.

    Hooks: `wrap_gradient`, `wrap_step`. Defaults: alpha 0.01 and beta 0.01, the paper's for most tasks (0.001 to 1).
    """

    name: ClassVar[str] = "l2-sp"
    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.GRADIENT,
        effect="distance",
        cost="no extra passes; a copy of the trainable weights, and a pass over them per step",
        state=1,
        paper="Li, Grandvalet, Davoine: Explicit Inductive Bias for Transfer Learning, ICML 2018, arXiv:1802.01483",
        combines="everything; pointless with lora, whose updates start at zero",
    )

    alpha: float = parameter(0.01, "pull towards the pretrained weights", ge=0)
    beta: float = parameter(0.01, "pull of a new head towards zero", ge=0)

    @hook
    def wrap_gradient(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner gradient, plus that of the penalty."""
        start, weights = self._start(ctx), ctx.run.optimised()
        terms = inner(ctx, works)
        pulls = {}
        for name, weight in weights.items():
            if name in start:
                pulls[name] = self.alpha * (wide(weight.detach()) - start[name])
            else:
                pulls[name] = self.beta * wide(weight.detach())
        ctx.add_grads(pulls)
        return terms

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step; every so often, how far what is pulled is from where it is pulled to."""
        start = self._start(ctx)
        terms = inner(ctx, works)
        if ctx.run.step % _MEASURE_EVERY == 0:
            weights = {name: wide(weight.detach()) for name, weight in ctx.run.optimised().items()}
            apart = [weight - start[name] for name, weight in weights.items() if name in start]
            apart += [weight for name, weight in weights.items() if self.beta and name not in start]
            if apart:  # else a schedule holds everything that is pulled
                ctx.report(self, distance=torch.nn.utils.get_total_norm(apart))
        return terms

    @staticmethod
    def _start(ctx: Context) -> dict[str, Tensor]:
        """Where the weights of the model without its new parts stood at the first step that they were trained in."""
        run, start = ctx.run, ctx.run.state("l2-sp")
        new = [*run.task.head, *run.missing_parameters]
        for name, weight in run.optimised().items():
            if name not in start and "/" not in name and not any(fnmatch.fnmatchcase(name, part) for part in new):
                start[name] = wide(weight.detach()).clone()
        return start
