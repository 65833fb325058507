"""Prototypical networks: a class is the mean of its support rows' embeddings, a query row belongs to the nearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.errors import ConfigError, StackError
from hybridengine.plugin import Band, Run, StackView, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, Prediction, View, pooled, support_of

__all__ = ["Prototypical"]

_READS_HEAD = "it reads the logits of the model's head, which classifies nothing here; remove one of the two"
_HEAD_FIRST = "it trains the head alone at first, which classifies nothing here; remove one of the two"


@dataclass(eq=False)
class Prototypical:
    """Trains the encoder so that rows of a class lie together: no head, no inner loop, new classes without training.

    Maths: e(x) = mean of the last hidden state over attended tokens (`pooling: first`: its first token); prototype
    c_n = mean of e over the K support rows of class n; the logit of class n is −‖e(x) − c_n‖² / temperature, or
    cos(e(x), c_n) / temperature; the loss is the task's cross-entropy of the query rows. Support rows are encoded under
    the dropout key of the step, forked, and their gradient counts. The head of the model is not used and stays as it
    is. Rows without support have no classes: `predict` gives each the same probability, and says so.

    Paper: Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning".
    Hooks: `on_run_start`, `check_stack`, `wrap_loss`, `wrap_predict`. Cost: a plain step over support and query rows.
    Combines with attacks (on the query rows), `rdrop`, `sam`, `lora`, averages.
    """

    traits: ClassVar[Traits] = Traits(
        family="meta",
        order=Band.LEAF,
        slots=("meta", "leaf_loss"),
        requires=("episodes", "labels"),
        conflicts={
            **dict.fromkeys(("vat", "smart", "alum", "r3f", "distill"), _READS_HEAD),
            **dict.fromkeys(("gradual-unfreeze", "lp-ft"), _HEAD_FIRST),
        },
        ignores_inner=("loss", "predict"),
        effect="margin",
        cost="a plain step over support and query rows",
        paper="Snell, Swersky, Zemel 2017, arXiv:1703.05175",
        combines="episodes (needed), attacks, rdrop, sam, lora; not another leaf loss",
    )

    metric: Literal["euclidean", "cosine"] = parameter("euclidean", "squared distance, or the cosine")
    temperature: float | None = parameter(
        None, "what logits are divided by; by default 0.1 for the cosine, the width of the embedding otherwise", gt=0
    )
    pooling: Literal["mean", "first"] = parameter("mean", "mean over attended tokens, or the first token")

    @hook
    def check_stack(self, stack: StackView) -> list[str]:
        """Steps on the support rows at test time would train a head that nobody reads."""
        if "episodes" in stack.names and stack.parameters("episodes").get("adapt_parameters"):
            return [
                "prototypical: prototypes need no gradient steps at test time; remove `adapt_parameters` of episodes"
            ]
        return []

    @hook
    def on_run_start(self, run: Run) -> None:
        """No inner loop, so `episodes` adapts nothing at test time."""
        run.inner_patterns = ()

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The cross-entropy of the query rows by distances from the prototypes."""
        out = self._outputs(ctx, batch, view)
        if torch.is_grad_enabled() and not out.scores.requires_grad:
            raise ConfigError(
                "prototypical: nothing below the head is trained, and the head classifies nothing here; remove what"
                " freezes the encoder"
            )
        with torch.no_grad():
            ctx.report(self, margin=_margin(out.scores, batch.targets))
        return replace(out, terms=ctx.run.task.terms(out.scores, batch))

    @hook
    def wrap_predict(self, inner: Callable[..., Prediction], ctx: Context, batch: Batch, view: View) -> Prediction:
        """Probabilities by the prototypes of the batch's own support rows."""
        if "support" in batch.parts:
            with torch.no_grad():
                out = self._outputs(ctx, batch, view)
            terms = {} if batch.targets is None else ctx.run.task.terms(out.scores, batch)
            return Prediction(out.scores.softmax(-1), terms=terms)
        ways = len(ctx.run.labels)
        ctx.run.say(
            "prototypical: rows without support rows have no classes, so each gets the same probability; evaluate"
            " episodes, or train a head with another method"
        )
        return Prediction(torch.full((batch.size, ways), 1 / ways, device=ctx.run.device))

    def _outputs(self, ctx: Context, batch: Batch, view: View) -> Out:
        """Logits `[B, N]` of a batch with a part `support`."""
        support = support_of(batch, "prototypical")
        rows = self._embedded(ctx, support, view.clean().fork("support"))[0]
        queries, out = self._embedded(ctx, batch, view)
        member = functional.one_hot(support.targets, len(ctx.run.labels)).to(rows.dtype)  # [S, N]
        centres = (member.T @ rows) / member.sum(0).clamp_min(1)[:, None]
        return replace(out, logits=self._logits(queries, centres), features=None)

    def _embedded(self, ctx: Context, batch: Batch, view: View) -> tuple[Tensor, Out]:
        out = ctx.outputs(batch, [view], features=True)[0]
        mask = batch.inputs.get("attention_mask")
        hidden = out.features
        if hidden is None or mask is None or hidden.shape[:2] != mask.shape:
            raise StackError(
                "prototypical: this model gives no hidden state for each token of its input; use an encoder or decoder"
            )
        return pooled(hidden, mask, self.pooling), out

    def _logits(self, queries: Tensor, centres: Tensor) -> Tensor:
        if self.metric == "cosine":
            cosine = functional.normalize(queries, dim=-1) @ functional.normalize(centres, dim=-1).T
            return cosine / (self.temperature or 0.1)
        squared = ((queries[:, None] - centres[None]) ** 2).sum(-1)
        return -squared / (self.temperature or queries.shape[-1])


def _margin(logits: Tensor, targets: Tensor) -> Tensor:
    """How far, in logits, the own class lies from the nearest other one, on average and without sign."""
    own = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], float("-inf")).amax(1, keepdim=True)
    return (own - others).abs().mean()
