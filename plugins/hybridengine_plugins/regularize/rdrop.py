"""R-Drop: two dropout masks, one prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, kl_rows

__all__ = ["RDrop"]


@dataclass(eq=False)
class RDrop:
    """Evaluate each row under two dropout masks and pull the two predictions together.

        loss = (CE_1 + CE_2) / 2 + alpha (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2

    Token tasks take each row's mean over its scored tokens, multi-label tasks the sum over the labels. Both sides
    receive gradients. Adding alpha to the mean of the cross-entropies keeps alpha as in the paper while the size of the
    loss stays that of plain training.

    Hook: `wrap_loss`. Default: alpha 1 (paper: 0.1 to 1 for understanding tasks, 5 for translation).
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.CONSISTENCY,
        requires=("dropout",),
        effect="kl",
        cost="2 forwards and the backward through both, as one doubled batch where it fits; 2x a plain step",
        paper="Liang et al.: R-Drop: Regularized Dropout for Neural Networks, NeurIPS 2021",
        combines="lora, fgm (both masks share delta), freelb, ema; with vat it is redundant",
    )

    alpha: float = parameter(1.0, "factor of the divergence between the two predictions", ge=0)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The mean of two evaluations, plus their divergence."""
        views = [view.fork("rdrop", 0), view.fork("rdrop", 1)]
        terms, outs = ctx.several(inner, batch, views)
        p, q = outs[0].scores, outs[1].scores
        kl = kl_rows(p, q, batch, ctx.run.task, direction="symmetric")
        ctx.report(self, kl=kl / batch.size)
        return replace(outs[0], terms={**terms, "rdrop": (self.alpha * kl, "rows")})
