"""PGD: several projected adversarial steps on the embeddings, then one training pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine.plugin import Band, TargetedAttack, Traits, hook, parameter
from hybridengine.seams import Context, Work, sequence_norms

__all__ = ["PGD"]


@dataclass(eq=False)
class PGD(TargetedAttack):
    """Train on the worst input that projected gradient ascent finds within a ball around the embeddings.

    With e the output of the embedding layer, delta_0 = 0 and norms per sequence over its perturbable tokens:

        g_t = dL(e + delta_t)/d delta
        delta_{t+1} = P(delta_t + step_size g_t / ||g_t||),        P projects onto ||delta|| <= epsilon
        gradient = dL(e + delta_K)/dw

    The ascents evaluate the task's own loss under the dropout masks of the training pass and compute no weight
    gradients, so nothing has to be backed up. One step of step_size = epsilon is FGM with weight 1. `targeted` descends
    the loss of another class instead (`loss_gain` is then how much that loss fell).

    Hook: `wrap_backward`. Defaults: epsilon 0.1 as for `fgm`, half of it a step, 3 steps, so that the projection
    is felt.
    """

    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.EMBEDDING_ATTACK,
        slots=("embedding_attack",),
        requires=("embeddings",),
        effect="delta_norm",
        cost="1 full pass and `steps` delta-only passes; with 3 steps 3x a plain step",
        paper="Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
        combines="lora, rdrop, ema, episodes; not with another embedding attack",
    )

    epsilon: float = parameter(0.1, "radius of the ball per sequence (linf: half width of the box)", ge=0)
    step_size: float = parameter(0.05, "length of one ascent step", gt=0)
    steps: int = parameter(3, "ascent steps", ge=1)
    norm: Literal["l2", "linf"] = parameter("l2", "norm of steps and ball")

    @hook
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """Ascend on delta, then one full pass at its end."""
        delta = ctx.shared("pgd", work, lambda: self._attack(ctx, work))
        ctx.report(self, delta_norm=sequence_norms(delta).mean())
        return inner(ctx, work.at(work.view.plus(delta)))

    def _attack(self, ctx: Context, work: Work) -> dict[str, Tensor]:
        slope, delta, heights = self.slope(ctx, work), ctx.zeros(work.batch), []
        sizes = {"step_size": self.step_size, "epsilon": self.epsilon}
        for _ in range(self.steps):
            height, gradient = slope(delta)
            delta = self.ascend(ctx, work.batch, delta, gradient, **sizes, norm=self.norm)
            heights.append(height)
        if len(heights) > 1:
            ctx.report(self, loss_gain=heights[-1] - heights[0])
        return delta
