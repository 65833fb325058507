"""FreeLB: every ascent step on the embeddings also trains the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine import kernels
from hybridengine.plugin import Attack, Band, Traits, hook, parameter
from hybridengine.seams import Context, Work, add_terms, sequence_norms

__all__ = ["FreeLB"]


@dataclass(eq=False)
class FreeLB(Attack):
    """Accumulate the weight gradient of every step of an adversarial ascent: a larger virtual batch along the attack.

    With e the output of the embedding layer, n tokens of width D in a sequence, norms per sequence over its
    perturbable tokens:

        delta_0 = init U(-1, 1) / sqrt(n D)
        gradient += (1 / steps) dL(e + delta_t)/dw,        t = 0 .. steps - 1
        delta_{t+1} = P(delta_t + step_size g_t / ||g_t||),        g_t from the same backward

    P projects onto ||delta|| <= epsilon where epsilon is given. All steps share one dropout mask, as the paper asks.

    Hook: `wrap_backward`. Defaults: 3 steps of 0.1 from 0 without projection, from the published GLUE settings (steps
    2 to 4, step_size 0.04 to 0.1, init 0 to 1, epsilon off to 0.7). With one step and init 0 it is plain training.
    """

    name: ClassVar[str] = "freelb"
    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.EMBEDDING_ATTACK,
        slots=("embedding_attack",),
        requires=("embeddings",),
        effect="delta_norm",
        cost="`steps` full passes; with 3 steps 3x a plain step",
        paper="Zhu et al.: FreeLB: Enhanced Adversarial Training for Natural Language Understanding, ICLR 2020",
        combines="lora, rdrop, ema, template; with sam it costs 2 x steps; not with another embedding attack",
    )

    steps: int = parameter(3, "ascent steps, each a full pass", ge=1)
    step_size: float = parameter(0.1, "length of one ascent step", gt=0)
    epsilon: float | None = parameter(None, "radius of the ball per sequence; null does not project", ge=0)
    init: float = parameter(0.0, "size of the random start", ge=0)
    norm: Literal["l2", "linf"] = parameter("l2", "norm of steps and ball")

    @hook
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """`steps` full passes at 1/steps of the weight along the ascent; returns the mean of their terms."""
        path: list[dict[str, Tensor]] = ctx.shared("freelb", work, lambda: [self._begin(ctx, work)])
        share = work.scaled(1 / self.steps)
        total: dict[str, Tensor] = {}
        for step in range(self.steps):
            last = step == self.steps - 1
            leaves = {site: d.detach().requires_grad_() for site, d in path[step].items()}
            with ctx.no_sync(not last):
                total = add_terms(total, inner(ctx, share.at(work.view.plus(leaves))))
            if not last and len(path) == step + 1:  # longer: an outer method's earlier pass made the path
                gradient = [leaf.grad for leaf in leaves.values()]
                sizes = {"step_size": self.step_size, "epsilon": self.epsilon}
                path.append(self.ascend(ctx, work.batch, leaves, gradient, **sizes, norm=self.norm))
        ctx.report(self, delta_norm=sequence_norms(path[-1]).mean())
        return total

    def _begin(self, ctx: Context, work: Work) -> dict[str, Tensor]:
        delta = ctx.zeros(work.batch)
        if self.init == 0:
            return delta
        rows, masks = work.batch.rows, {site: ctx.mask(work.batch, site) for site in delta}
        draws = {
            site: ctx.rng(f"freelb/{site}", rows).uniform(*zero.shape[1:]).to(zero) for site, zero in delta.items()
        }
        return kernels.perturb_start(draws, masks, epsilon=self.strength(ctx.run.step) * self.init, per=self.per)
