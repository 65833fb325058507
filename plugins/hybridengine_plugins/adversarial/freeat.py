"""FreeAT: every ascent step on the embeddings is also an update of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine.plugin import Attack, Band, StackView, Traits, hook, parameter
from hybridengine.seams import Context, Work, add_terms, sequence_norms

__all__ = ["FreeAT"]


@dataclass(eq=False)
class FreeAT(Attack):
    """Replay each step's rows, and let each replay update the weights and push the perturbation further.

    With e the output of the embedding layer, delta_0 = 0 and norms per sequence over its perturbable tokens:

        w <- the optimizer's update by dL(e + delta_t)/dw,        t = 0 .. steps - 1
        delta_{t+1} = P(delta_t + step_size g_t / ||g_t||),        g_t = dL(e + delta_t)/d delta from the same backward

    P projects onto ||delta|| <= epsilon where epsilon is given. A replay is a whole optimizer step over all
    micro-batches, with embeddings of the weights as they then are; all replays of a step share its dropout masks and
    its learning rate. A run therefore makes `steps` times as many updates: for the paper's equal cost, divide `epochs`
    by `steps`. With one step it is plain training. `freelb` sums the same gradients into one update instead.

    Hooks: `wrap_step`, `check_stack`. Defaults: 3 replays with steps of 0.1 and no projection, as `freelb`.
    """

    name: ClassVar[str] = "freeat"
    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.UPDATE,
        slots=("embedding_attack",),
        requires=("embeddings",),
        effect="delta_norm",
        cost="`steps` full passes and updates; with 3 steps 3x a plain step",
        paper="Shafahi et al.: Adversarial Training for Free!, NeurIPS 2019; for text: Zhu et al. (FreeLB), ICLR 2020",
        combines="lora, rdrop, ema, template, episodes; not with another embedding attack, sam and its kin, or reptile",
    )

    steps: int = parameter(3, "replays, each an update of the weights", ge=1)
    step_size: float = parameter(0.1, "length of one ascent step", gt=0)
    epsilon: float | None = parameter(None, "radius of the ball per sequence; null does not project", ge=0)
    norm: Literal["l2", "linf"] = parameter("l2", "norm of steps and ball")

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """Methods in whose passes the perturbation would have no gradient, or a mixed one."""
        problems = []
        for other in stack.methods:
            if "weight_perturbation" in other.traits.slots:
                reason = "evaluates every replay at two places, and delta would follow the sum of both gradients"
            elif "backward" in other.traits.ignores_inner:
                reason = "never evaluates the rows that are perturbed, so delta would stay 0"
            else:
                continue
            problems.append(f"freeat and {other.name} cannot be combined: {other.name} {reason}; remove one of the two")
        return problems

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """`steps` inner steps on the same rows along the ascent; returns the mean of their terms."""
        deltas, total = [ctx.zeros(work.batch) for work in works], dict[str, Tensor]()
        for replay in range(self.steps):
            last = replay == self.steps - 1
            leaves = [{site: d.detach().requires_grad_() for site, d in delta.items()} for delta in deltas]
            moved = [work.at(work.view.plus(own)) for work, own in zip(works, leaves, strict=True)]
            with ctx.holding_schedule(not last):
                total = add_terms(total, inner(ctx, moved))
            if not last:
                deltas = [self._ascend(ctx, work, own) for work, own in zip(works, leaves, strict=True)]
        for delta in deltas:
            ctx.report(self, delta_norm=sequence_norms(delta).mean())
        return {name: value / self.steps for name, value in total.items()}

    def _ascend(self, ctx: Context, work: Work, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gradient = [leaf.grad for leaf in leaves.values()]
        sizes = {"step_size": self.step_size, "epsilon": self.epsilon}
        return self.ascend(ctx, work.batch, leaves, gradient, **sizes, norm=self.norm)
