"""Gradual unfreezing: training starts at the head and reaches one layer deeper every few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hybridengine.plugin import Band, Run, Traits, hook, parameter, parameter_levels
from hybridengine.seams import Context, Work

__all__ = ["GradualUnfreeze"]


@dataclass(eq=False)
class GradualUnfreeze:
    """Trains the head first, then one more layer every `steps` steps, the embeddings last.

    Maths: the levels that hold trainable parameters are g₁ (head) … g_M (embeddings); step t optimises the first
    1 + ⌊t / steps⌋ of them. A random head would otherwise send large gradients through pretrained layers. The
    trainable set is a function of the step alone, so a resumed run goes on exactly; the others get no gradient, no
    weight decay and no optimizer state until their turn.

    Paper: Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification" (ULMFiT).
    Hooks: `wrap_step`. Cost: less than a plain step until all is unfrozen. Combines with everything.
    """

    traits: ClassVar[Traits] = Traits(
        family="adapters",
        order=Band.UPDATE,
        effect="trainable",
        cost="a plain step at most; early backward passes are short",
        paper="Howard and Ruder 2018, arXiv:1801.06146",
        combines="everything; freeze keeps its part frozen for good",
    )

    steps: int = parameter(100, "optimizer steps before the next layer joins", ge=1)
    _levels: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _top: int = field(default=1, init=False, repr=False)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Note the level of every parameter; run modules (prompts, learned rates) count as the top."""
        self._levels, self._top = parameter_levels(run.model, run.task.head)

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Make the step with the levels whose turn it is; afterwards all are as before, whatever happens."""
        level_of = {k: self._levels.get(k, self._top) for k in ctx.run.optimised()}
        turns = sorted(set(level_of.values()), reverse=True)[: 1 + ctx.run.step // self.steps]
        with ctx.resting(name for name, level in level_of.items() if level not in turns):
            ctx.report(self, trainable=float(len(ctx.run.optimised())))
            return inner(ctx, works)
