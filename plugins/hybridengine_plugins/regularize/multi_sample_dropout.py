"""Multi-sample dropout: one pass of the encoder, several dropout masks of the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import ModelError
from hybridengine.plugin import Band, Run, Traits, hook, parameter
from hybridengine.seams import Backbone, Batch, Context, Out, View

__all__ = ["MultiSampleDropout"]


@dataclass(eq=False)
class MultiSampleDropout:
    """Train the head on several samples of dropout in each step, at nearly the cost of one.

    With h the states below the head, m_k masks of a share `p` of their units, and f the head with its own dropout:

        loss = 1/K sum_k L(f_k(h * m_k / (1 - p)))

    The encoder is passed once, forward and backward; it gets the mean of the gradients at h. The samples make the
    gradient less noisy, as a K times larger batch of doubled rows would. Evaluation has no dropout and is unchanged.

    Hooks: `on_run_start`, `wrap_loss`. Defaults: K = 8 samples, p 0.3, as in the paper.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.TERM,
        requires=("labels",),
        effect="spread",
        cost="no extra passes of the encoder; the head runs once for each sample",
        paper="Inoue: Multi-Sample Dropout for Accelerated Training and Better Generalization, 2019, arXiv:1905.09788",
        combines="everything; with rdrop each of the two passes has its samples",
    )

    samples: int = parameter(8, "dropout masks of the head in each pass", ge=2)
    p: float = parameter(0.3, "share of the head's inputs that is dropped, beside the head's own dropout", ge=0, lt=1)

    @hook
    def on_run_start(self, run: Run) -> None:
        """Find the head.

        Raises:
            ModelError: it does not run alone.
        """
        if run.predicting:
            return
        run.backbone = Backbone.find(run.model, run.probe)
        if run.backbone is None:
            raise ModelError(
                f"multi-sample-dropout: the head of {run.config.model.name} cannot run apart from what lies below it;"
                " use rdrop, or remove multi-sample-dropout"
            )

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The mean of the inner losses of all samples."""
        views = [view, *(view.fork("sample", k) for k in range(1, self.samples))]
        with ctx.heads_alone(self._dropped if self.p else None):
            outs = [inner(ctx, batch, at) for at in views]
        terms = {}
        for name, (_, unit) in outs[0].terms.items():
            values = torch.stack([out.terms[name][0] for out in outs])
            terms[name] = (values.mean(), unit)
            if name == next(iter(outs[0].terms)):
                ctx.report(self, spread=values.std(correction=0) / batch.size)
        return replace(outs[0], terms=terms, replay=outs[0].replay and not self.p)

    def _dropped(self, states: Tensor) -> Tensor:
        return functional.dropout(states, self.p)
