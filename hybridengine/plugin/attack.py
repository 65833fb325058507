"""The options that attacks on embeddings share: when they act, how strongly, in whose norm, and towards what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hybridengine.errors import StackError
from hybridengine.plugin.hookspecs import hook
from hybridengine.plugin.stacking import StackView
from hybridengine.plugin.traits import parameter
from hybridengine.seams import Batch, Context, Work, weighted_sum

__all__ = ["Attack", "TargetedAttack"]

Slope = Callable[[Mapping[str, Tensor]], tuple[Tensor, list[Tensor | None]]]
"""Delta by site to what an attack climbs there, and its gradient."""


@dataclass(eq=False, kw_only=True)
class Attack:
    """A base for methods that perturb embeddings, e.g. `class PGD(Attack)`: three parameters, and what they mean.

    A subclass takes its steps by `ascend` in place of `ctx.ascend`, and multiplies sizes of its own by `strength`. One
    in which an option has no meaning fixes it by `field(default=..., init=False)`.
    """

    start: int = parameter(0, "first optimizer step with the attack", ge=0)
    ramp: int = parameter(0, "steps after `start` over which its sizes grow linearly from 0; 0: full at once", ge=0)
    per: Literal["sequence", "token"] = parameter("sequence", "whose norm sizes are: a sequence's, or each token's")

    def active(self, step: int) -> bool:
        """Whether the attack acts at this step."""
        return step >= self.start

    def strength(self, step: int) -> float:
        """The share of its sizes at this step: 1 / ramp in the first step of the ramp, 1 in its last and after it."""
        return min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0

    def ascend(
        self,
        ctx: Context,
        batch: Batch,
        delta: Mapping[str, Tensor],
        gradient: Sequence[Tensor | None],
        *,
        step_size: float,
        epsilon: float | None = None,
        norm: Literal["l2", "linf"] = "l2",
    ) -> dict[str, Tensor]:
        """`ctx.ascend` in the norm of `per`, its sizes at their present strength."""
        share = self.strength(ctx.run.step)
        ball = None if epsilon is None else share * epsilon
        return ctx.ascend(batch, delta, gradient, step_size=share * step_size, epsilon=ball, norm=norm, per=self.per)


@dataclass(eq=False, kw_only=True)
class TargetedAttack(Attack):
    """An attack that searches by gradients of its own, and can therefore search for another answer than the label.

    Untargeted it climbs the task's own loss. Targeted it descends the cross-entropy of another class: the least likely
    one at the clean input, or a random one, keyed by step and row (and token). Special and padded tokens without a
    label have no target either.
    """

    targeted: Literal["least-likely", "random"] | None = parameter(
        None, "descend towards another class in place of climbing the loss: the least likely one, or any"
    )

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """Another class needs classes."""
        if self.targeted is None or len(stack.facts["labels"]) > 1:
            return []
        (name,) = (method.name for method in stack.methods if method.plugin is self)
        return [f"{name}: `targeted` needs a task with two classes or more; remove `targeted`, or take another task"]

    def slope(self, ctx: Context, work: Work) -> Slope:
        """What the attack climbs, at any delta; the target is chosen at the first.

        A forward and a delta-only backward at each call, under the dropout masks of the work.

        Raises:
            StackError: targeted, where a row's (or token's) answer is not one class of several.
        """
        aimed: list[Batch] = []

        def climb(delta: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
            leaves = {site: d.detach().requires_grad_() for site, d in delta.items()}
            out = ctx.task_loss(work.batch, work.view.plus(leaves))
            terms = out.terms
            if self.targeted is not None:
                if not aimed:
                    aimed.append(replace(work.batch, targets=self._others(ctx, work.batch, out.scores.detach())))
                towards = ctx.run.task.terms(out.scores, aimed[0])
                terms = {name: (-value, unit) for name, (value, unit) in towards.items()}
            height = weighted_sum(terms, work.weights)
            return height.detach(), ctx.grad(height, list(leaves.values()))

        return climb

    def _others(self, ctx: Context, batch: Batch, scores: Tensor) -> Tensor:
        """A class for each target that is not its label; targets below 0 count nowhere and stay."""
        labels, classes = batch.targets, scores.shape[-1]
        if not isinstance(labels, Tensor) or labels.shape != scores.shape[:-1] or classes < 2:
            raise StackError(
                "`targeted` needs one class for each row or token, of two or more, which this task does not have;"
                " remove `targeted`"
            )
        own = labels.clamp_min(0)
        if self.targeted == "random":
            draws = ctx.rng("targeted", batch.rows).uniform(*labels.shape[1:]).to(labels.device)
            others = (own + 1 + (draws * (classes - 1)).long()) % classes
        else:
            others = scores.scatter(-1, own.unsqueeze(-1), torch.inf).argmin(-1)
        return torch.where(labels < 0, labels, others)
