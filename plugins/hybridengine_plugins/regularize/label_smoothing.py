"""Label smoothing: a share of every label spread over all classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View

__all__ = ["LabelSmoothing"]

_MEASURE_EVERY = 10  # steps between measurements of the effect, each a second look at the logits


@dataclass(eq=False)
class LabelSmoothing:
    """Train towards (1 - smoothing) on the label and smoothing / C on each of the C classes.

        loss = (1 - smoothing) CE + smoothing / C sum_c -log p_c

    It is the leaf loss: the task's plain cross-entropy is not computed beside it, except every tenth step to report
    by how much the two differ.

    Hook: `wrap_loss`. Default: smoothing 0.1, the common value since Szegedy et al.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.LEAF,
        slots=("leaf_loss",),
        ignores_inner=("loss",),
        effect="loss_change",
        paper="Szegedy et al.: Rethinking the Inception Architecture, CVPR 2016",
        combines="anything but another leaf loss; class-weights has a label_smoothing of its own",
    )

    smoothing: float = parameter(0.1, "share of the label spread over all classes", ge=0, lt=1)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The task's loss with smoothed labels."""
        out = ctx.outputs(batch, [view])[0]
        logits, task = out.logits, ctx.run.task
        terms = task.terms(logits, batch, label_smoothing=self.smoothing)
        if ctx.run.step % _MEASURE_EVERY == 0:
            with torch.no_grad():
                plain = task.terms(logits, batch)
                change = sum(abs(terms[name][0] - value) for name, (value, _) in plain.items())
                ctx.report(self, loss_change=change / batch.size)
        return replace(out, terms=terms)
