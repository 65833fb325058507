"""LP-FT: the head alone first, then everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hybridengine.plugin import Band, Run, Traits, hook, parameter, parameter_levels
from hybridengine.seams import Context, Work

__all__ = ["LPFT"]


@dataclass(eq=False)
class LPFT:
    """Trains a linear probe in the first `steps` steps, and all that the stack trains from then on.

    Maths: in steps t < steps only the topmost trained level (head, pooler, run modules) moves; then all do, from the
    probe's solution. A random head would otherwise distort pretrained features before it has learnt to read them. The
    others get no gradient, no weight decay and no optimizer state until then.

    Paper: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution". It
    trains the probe to convergence and then anew with a rate of its own: `stages` with `freeze` does that.
    Hooks: `wrap_step`. Cost: probe steps have nearly no backward pass. Combines with everything.
    """

    name: ClassVar[str] = "lp-ft"
    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.UPDATE,
        conflicts={"gradual-unfreeze": "it starts with the head alone as well; remove one of the two"},
        effect="resting",
        cost="a plain step at most; backward passes of the probe are short",
        paper="Kumar et al. 2022, arXiv:2202.10054",
        combines="everything but gradual-unfreeze",
    )

    steps: int = parameter(100, "optimizer steps of the head alone", ge=1)
    _levels: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _top: int = field(default=1, init=False, repr=False)

    def active(self, step: int) -> bool:
        """Whether the head trains alone at this step."""
        return step < self.steps

    @hook
    def on_run_start(self, run: Run) -> None:
        """Note the level of every parameter; run modules (prompts, learned rates) count as the top."""
        self._levels, self._top = parameter_levels(run.model, run.task.head)

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Make the step with the topmost level alone."""
        level_of = {name: self._levels.get(name, self._top) for name in ctx.run.optimised()}
        below = [name for name, level in level_of.items() if level < max(level_of.values())]
        ctx.report(self, resting=float(len(below)))
        with ctx.resting(below):
            return inner(ctx, works)
