"""Focal and poly loss: cross-entropy with another weight on what is learned already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hybridengine.errors import DataError
from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, log_likelihoods

__all__ = ["Focal", "Poly"]

_MEASURE_EVERY = 10  # steps between measurements of the effect


class _OfLikelihood(ABC):
    """A leaf loss that is a function of the truth's log-probability alone, summed over rows, labels or tokens."""

    @abstractmethod
    def _values(self, log_p: Tensor) -> Tensor:
        """The loss of each unit."""

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The loss of every unit from its log-probability."""
        out = ctx.outputs(batch, [view])[0]
        if batch.targets is None:
            raise DataError("these rows have no label, so they have no loss")
        log_p, unit = log_likelihoods(out.logits, batch, ctx.run.task)
        loss = self._values(log_p).sum()
        if ctx.run.step % _MEASURE_EVERY == 0:
            with torch.no_grad():
                ctx.report(self, loss_change=(loss + log_p.sum()).abs() / batch.size)
        return replace(out, terms={"loss": (loss, unit)})


@dataclass(eq=False)
class Focal(_OfLikelihood):
    """Counts a row the less, the surer the model is of its label.

        loss = -(1 - p)^gamma log p,    p the probability of the truth

    At gamma 0 it is cross-entropy. With several labels a row, every label counts so by itself; with tags, every token.
    The loss is smaller than cross-entropy, so a term beside it (R-Drop's) weighs more.

    Hook: `wrap_loss`. Default: gamma 2 as in the paper. Confidences of a model trained so are lower than its accuracy.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.LEAF,
        slots=("leaf_loss",),
        requires=("labels",),
        ignores_inner=("loss",),
        effect="loss_change",
        paper="Lin et al.: Focal Loss for Dense Object Detection, ICCV 2017",
        combines="anything but another leaf loss",
    )

    gamma: float = parameter(2.0, "how fast what is learned stops to count; 0 is cross-entropy", ge=0)

    def _values(self, log_p: Tensor) -> Tensor:
        # A row that is certain has derivative 0, but a power below 1 has none at 0.
        missing = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
        return -(missing**self.gamma) * log_p


@dataclass(eq=False)
class Poly(_OfLikelihood):
    """Cross-entropy with another weight of its first polynomial term.

        loss = -log p + epsilon (1 - p),    p the probability of the truth

    -log p is the sum over k of (1 - p)^k / k; epsilon changes the factor of k = 1, which has the largest gradient early
    on. At 0 it is cross-entropy; above 0 it learns what is likely already more surely, below 0 less so.

    Hook: `wrap_loss`. Default: epsilon 1 (the paper's best are from -1 to 6, for other tasks).
    """

    traits: ClassVar[Traits] = replace(Focal.traits, paper="Leng et al.: PolyLoss, ICLR 2022, arXiv:2204.12511")

    epsilon: float = parameter(1.0, "what is added to the factor of 1 - p", ge=-1)

    def _values(self, log_p: Tensor) -> Tensor:
        return -log_p - self.epsilon * torch.expm1(log_p)
