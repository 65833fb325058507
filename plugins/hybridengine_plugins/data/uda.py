"""UDA: the same prediction for an unlabelled text and for its rewritten version."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridengine.errors import StackError
from hybridengine.plugin import Band, Run, Split, StackView, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, kl_rows, log_likelihoods
from hybridengine.text import rewrite_unlabelled

__all__ = ["UDA"]

_DROPPED = -100  # a target that no loss counts


@dataclass(eq=False)
class UDA:
    """Add the divergence between predictions on unlabelled texts and on their rewritten versions.

    With x an unlabelled row, x^ its version by the augmentation in the stack, z the logits and p the softmax:

        q(x) = softmax(z(x) / temperature), without gradient
        loss = CE + weight / U sum_x 1[max p(x) > threshold] KL(q(x) || p(x^)),    U the unlabelled rows of the step

    Every unlabelled row is rewritten once, before training, by the methods of augmentation in the stack, each in turn
    (`copies: 0` keeps them from adding training rows too). Both passes draw dropout masks of their own.

    `annealing` keeps few labels from being learned by heart: at step t of T, labels of rows of which the model is
    surer than 1/C + (1 - 1/C) a(t/T) do not count, C the number of classes and a(s) = s (`linear`), 1 - exp(-5 s)
    (`log`) or exp(5 (s - 1)) (`exp`, for the easiest data). The paper averages over the rows that are left, here they
    are divided by all labelled rows, so that a step may be split into any micro-batches.

    Hooks: `transform_data`, `wrap_loss`. Defaults: neither sharpening, threshold nor annealing, as in the authors'
    code; they take temperature 0.4 and threshold 0.8 for images with few labels. It rests on rewriting that keeps the
    label: crude synonyms in texts of a few words do not, and training then gets worse than without it.
    """

    name: ClassVar[str] = "uda"
    traits: ClassVar[Traits] = Traits(
        family="data",
        order=Band.SMOOTHNESS,
        requires=("labels", "text", "unlabelled", "augmentation"),
        effect="kl",
        cost="a forward over the unlabelled rows and a full pass over their versions, 2.33x a plain step; with"
        " annealing a forward over the labelled rows, 2.67x",
        paper="Xie et al.: Unsupervised Data Augmentation for Consistency Training, NeurIPS 2020, arXiv:1904.12848",
        combines="eda, synonym, mask-infill, back-translation (one of them is needed), lora, ema; vat does the same"
        " with perturbed embeddings",
    )

    weight: float = parameter(1.0, "factor of the divergence", ge=0)
    temperature: float = parameter(1.0, "below 1 sharpens the prediction on the unlabelled text", gt=0)
    threshold: float = parameter(0.0, "rows of which the model is less sure do not count", ge=0, lt=1)
    annealing: Literal["none", "linear", "log", "exp"] = parameter(
        "none", "how fast labels count again of which the model is sure"
    )

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """Labels that do not count are no class of their own."""
        if self.annealing != "none" and "supcon" in stack.names:
            return ["uda: annealing drops labels, which supcon would pair; set `annealing: none` or remove supcon"]
        return []

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Add the rewritten unlabelled rows.

        Raises:
            StackError: rows do not have exactly one label, or nothing rewrites them.
        """
        if run.dry or run.predicting:
            return None
        if "label" not in run.task.columns or getattr(run.task, "multi_label", False):
            raise StackError("uda needs one label for each row, which this task does not have; remove uda")
        return rewrite_unlabelled(run, splits, "uda") if "unlabelled" in splits else None

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss on the labels that count, plus the divergence on the unlabelled part."""
        out = inner(ctx, batch if self.annealing == "none" else self._annealed(ctx, batch, view), view)
        if "unlabelled" not in batch.parts:
            return out
        part, rewritten = batch.parts["unlabelled"], batch.parts["augmented"]
        with torch.no_grad():
            fixed = ctx.outputs(part, [view.clean().fork("unlabelled")])[0].scores
        sure = fixed.softmax(-1).amax(-1) > self.threshold
        moved = ctx.outputs(rewritten, [view.clean().fork("augmented")])[0].scores
        kl = kl_rows(fixed / self.temperature, moved, part, ctx.run.task, counted=sure)
        ctx.report(self, kl=kl / part.size, sure=sure.float().mean())
        return replace(out, terms={**out.terms, "uda": (self.weight * kl, "unlabelled_rows")})

    def _annealed(self, ctx: Context, batch: Batch, view: View) -> Batch:
        """The batch without labels of which the model is surer than it may be by now."""
        with torch.no_grad():
            scores = ctx.outputs(batch, [view])[0].scores
            probability: Tensor = log_likelihoods(scores, batch, ctx.run.task)[0].exp()
        chance, done = 1 / scores.shape[-1], ctx.run.step / max(ctx.run.total_steps, 1)
        grown = {"linear": done, "log": 1 - math.exp(-5 * done), "exp": math.exp(5 * (done - 1))}[self.annealing]
        dropped = probability > chance + (1 - chance) * grown
        ctx.report(self, dropped=dropped.float().mean())
        return replace(batch, targets=batch.targets.masked_fill(dropped, _DROPPED))
