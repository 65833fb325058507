"""Self-training: the model's own confident predictions as labels of unlabelled rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hybridengine.errors import StackError
from hybridengine.plugin import Band, Run, Split, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, Work, log_likelihoods
from hybridengine.text import rewrite_unlabelled

__all__ = ["SelfTraining"]

_UNLABELLED = -100  # a target that no loss counts


@dataclass(eq=False)
class SelfTraining:
    """Label unlabelled rows by the model as it is at each step, where it is sure, and learn these labels.

    With q(x) the prediction on an unlabelled row without gradient, y its likeliest class, and x^ the row as the
    augmentation in the stack has rewritten it (without any, x itself under other dropout masks):

        loss = CE + weight / U sum_x 1[q_y(x) > tau_y] (-log p_y(x^)),    U the unlabelled rows of the step
        tau_c = tau m_c / max m,    tau = `threshold`, or the running mean of max q (from 1/C on)

    m, the running mean of q (uniform at first), balances classes: the rarer the model predicts one, the lower its
    threshold. Both means are over steps, with `memory`; a step sees those of the steps before it, so that it may be
    split into any micro-batches. FreeMatch counts the step itself too, and adds a fairness term that is left out here.

    Labels are given online, as in FixMatch, and not in rounds: they follow the model at once where those of a round
    grow old, they need no copy of the model and no pass over all unlabelled rows in between, and a run goes on from a
    checkpoint with the same labels. `start` lets the labelled rows come first.

    Hooks: `transform_data`, `wrap_loss`, `wrap_step`. Defaults: FreeMatch's self-adaptive thresholds, with a shorter
    memory than its 0.999 for runs of hundreds of steps. `threshold: 0.95` with `balance: false` is FixMatch; a run that
    labels no row for 20 steps stops and says so, so start such thresholds later. Rewriting that changes what a text
    says (crude synonyms in a few words) makes it worse than no augmentation.
    """

    traits: ClassVar[Traits] = Traits(
        family="data",
        order=Band.SMOOTHNESS,
        requires=("labels", "unlabelled"),
        conflicts={
            "episodes": "an episode's classes are not those of the unlabelled rows; remove self-training, or use vat"
        },
        effect="labelled",
        cost="a forward over the unlabelled rows and a full pass over them or their versions, 2.33x a plain step",
        paper="Sohn et al.: FixMatch, NeurIPS 2020; Wang et al.: FreeMatch, ICLR 2023, arXiv:2205.07246; Lee 2013",
        combines="eda, synonym, mask-infill, back-translation, lora, ema; uda does the same with soft labels",
    )

    weight: float = parameter(1.0, "factor of the loss on the model's own labels", ge=0)
    threshold: float | None = parameter(None, "confidence that a label needs; null: the running mean", gt=0, lt=1)
    balance: bool = parameter(True, "lower thresholds for classes that are rarely predicted")
    memory: float = parameter(0.99, "how much of the running means survives a step", ge=0, lt=1)
    start: int = parameter(0, "first optimizer step with the model's own labels", ge=0)
    _seen: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def active(self, step: int) -> bool:
        """From `start` on."""
        return step >= self.start

    @hook
    def transform_data(self, run: Run, splits: dict[str, Split]) -> dict[str, Split] | None:
        """Add the rewritten unlabelled rows, where a method rewrites texts.

        Raises:
            StackError: rows do not have exactly one label.
        """
        if run.dry or run.predicting:
            return None
        if "label" not in run.task.columns or getattr(run.task, "multi_label", False):
            raise StackError(
                "self-training needs one label for each row, which this task does not have; remove self-training"
            )
        return rewrite_unlabelled(run, splits, "self-training") if run.rewrites and "unlabelled" in splits else None

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss, plus the loss on the unlabelled part under the model's own labels."""
        out = inner(ctx, batch, view)
        if "unlabelled" not in batch.parts:
            return out
        part = batch.parts["unlabelled"]
        with torch.no_grad():
            q = ctx.outputs(part, [view.clean().fork("unlabelled")])[0].scores.softmax(-1)
        self._seen.append(q)
        confidence, guess = q.max(-1)
        sure = confidence > self._thresholds(ctx, q)[guess]
        rewritten = batch.parts.get("augmented", part)
        labelled = replace(rewritten, targets=guess.masked_fill(~sure, _UNLABELLED))
        moved = ctx.outputs(labelled, [view.clean().fork("augmented")])[0].scores
        loss = -log_likelihoods(moved, labelled, ctx.run.task)[0].sum()
        ctx.report(self, labelled=sure.float().mean(), confidence=confidence.mean())
        return replace(out, terms={**out.terms, "self_training": (self.weight * loss, "unlabelled_rows")})

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step, after which the running means take in its predictions."""
        self._seen.clear()
        terms = inner(ctx, works)
        if self._seen:
            q, state = torch.cat(self._seen), ctx.run.state("self-training")
            mean, confidence = self._means(ctx, q)
            state["mean"] = torch.lerp(q.mean(0), mean, self.memory)
            state["confidence"] = torch.lerp(q.amax(-1).mean(), confidence, self.memory)
        return terms

    def _means(self, ctx: Context, q: Tensor) -> tuple[Tensor, Tensor]:
        """Running means of q `[C]` and of its largest entry; 1/C before the first step."""
        state, uniform = ctx.run.state("self-training"), torch.full_like(q[0], 1 / q.shape[-1])
        return state.get("mean", uniform).to(q), state.get("confidence", uniform[0]).to(q)

    def _thresholds(self, ctx: Context, q: Tensor) -> Tensor:
        """What the confidence of each class must exceed, `[C]`."""
        mean, confidence = self._means(ctx, q)
        level = confidence if self.threshold is None else torch.full_like(confidence, self.threshold)
        return level * mean / mean.max() if self.balance else level.expand_as(mean)
