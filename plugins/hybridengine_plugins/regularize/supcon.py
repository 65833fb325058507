"""Supervised contrastive learning: rows of one class lie together, others apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import StackError
from hybridengine.plugin import Run, Split, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, pooled

__all__ = ["SupCon"]


@dataclass(eq=False)
class SupCon:
    """Add a loss that pulls the texts of one class together and pushes those of others away.

    With z_i the pooled last hidden state of row i, normalised to length 1, and P(i) the other rows of its class in the
    micro-batch:

        loss = L + weight * sum_i -1/|P(i)| sum_{p in P(i)} log( exp(z_i z_p / T) / sum_{a != i} exp(z_i z_a / T) )

    A row without another of its class adds nothing. The paper weighs (1 - lambda) L + lambda SupCon: weight is
    lambda / (1 - lambda). The term couples the rows of a micro-batch, so that 8 of 4 rows are not 1 of 32; take large
    micro-batches rather than `accumulate`.

    Hooks: `transform_data`, `wrap_loss`. Defaults: weight 1, temperature 0.3 as in the paper.
    """

    name: ClassVar[str] = "supcon"
    traits: ClassVar[Traits] = Traits(
        family="regularize",
        requires=("labels",),
        conflicts={"prototypical": "it measures distances of states that no loss returns; remove one of the two"},
        effect="contrast",
        cost="no extra passes; the last layer is computed at every position",
        paper="Khosla et al., NeurIPS 2020; Gunel et al.: Supervised Contrastive Learning for Pre-trained Language"
        " Model Fine-tuning, ICLR 2021, arXiv:2011.01403",
        combines="everything that keeps one label a row; balanced-sampling gives rare classes partners",
    )

    weight: float = parameter(1.0, "factor of the contrastive term", ge=0)
    temperature: float = parameter(0.3, "small: the nearest rows of other classes count most", gt=0)
    pool: Literal["mean", "first"] = parameter("mean", "a text's state: the mean of its tokens, or its first")

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Leave the data; only say early that some tasks have no classes of rows.

        Raises:
            StackError: rows do not have exactly one label.
        """
        if not run.dry and ("label" not in run.task.columns or getattr(run.task, "multi_label", False)):
            raise StackError("supcon needs one label for each row, which this task does not have; remove supcon")
        return None

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss plus the contrast of its own hidden states."""
        with ctx.with_features():
            out = inner(ctx, batch, view)
        if out.features is None or batch.targets is None:
            raise StackError("supcon: the loss inside returned no hidden states or has no labels; remove supcon")
        states = pooled(out.features, batch.inputs["attention_mask"], self.pool)
        contrast = _contrast(states, batch.targets, self.temperature)
        ctx.report(self, contrast=contrast / batch.size)
        return replace(out, terms={**out.terms, "supcon": (self.weight * contrast, "rows")})


def _contrast(states: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The sum over rows."""
    z = functional.normalize(states, dim=-1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    near = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_share = near - near.logsumexp(1, keepdim=True)
    partners = (targets[:, None] == targets[None, :]) & ~itself
    own = torch.where(partners, log_share, 0.0).sum(1) / partners.sum(1).clamp_min(1)
    return -own.sum()
