"""Lookahead: slow weights that follow the optimizer's fast ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work, wide

__all__ = ["Lookahead"]


@dataclass(eq=False)
class Lookahead:
    """Let the optimizer run `steps` steps ahead, then go `alpha` of the way there and start again.

    With φ the slow and θ the fast weights, after every `steps` updates of θ:

        φ ← φ + alpha (θ − φ);        θ ← φ

    Moments of the optimizer stay as they are. Evaluation, `best/` and predictions use φ, as the paper does. With alpha
    1 training is that of the optimizer alone. Slow weights are kept in at least fp32 and in checkpoints; weights that a
    schedule thaws later get theirs then.

    Hooks: `wrap_step`, `wrap_evaluation`. Defaults: 5 steps and alpha 0.5, as in the paper's experiments on text.
    """

    traits: ClassVar[Traits] = Traits(
        family="optim",
        order=Band.AVERAGE - 5,
        effect="distance",
        cost="no extra passes; a copy of the trainable weights, and two passes over them every `steps` steps",
        state=1,
        paper="Zhang et al.: Lookahead Optimizer: k Steps Forward, 1 Step Back, NeurIPS 2019",
        combines="every optimizer; ema and swa average the fast weights",
    )

    # Up to 20, for its effect shows at these steps alone, and so many without any stop a run.
    steps: int = parameter(5, "updates of the fast weights before the slow ones follow", ge=1, le=20)
    alpha: float = parameter(0.5, "how much of the way the slow weights go", gt=0, le=1)

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step; when it is their turn, the slow weights follow and the fast ones come back to them."""
        slow = ctx.run.state("lookahead")
        for name, weight in ctx.run.optimised().items():
            if name not in slow:
                slow[name] = wide(weight.detach()).clone()
        terms = inner(ctx, works)
        if (ctx.run.step + 1) % self.steps == 0:
            weights = {name: weight.detach() for name, weight in ctx.run.optimised().items()}
            behind = [slow[name] for name in weights]
            way = torch._foreach_sub([wide(weight) for weight in weights.values()], behind)
            torch._foreach_add_(behind, way, alpha=self.alpha)
            torch._foreach_copy_(list(weights.values()), behind)
            ctx.report(self, distance=torch.nn.utils.get_total_norm(way))
        return terms

    @hook
    def wrap_evaluation(self, ctx: Context) -> AbstractContextManager[Any]:
        """The slow weights stand in for the fast ones."""
        slow, weights = ctx.run.state("lookahead"), ctx.run.optimised()
        return ctx.swapped({name: value for name, value in slow.items() if name in weights})
