"""Cutoff: a prediction must stand when a part of its input is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, js_rows

__all__ = ["Cutoff"]


@dataclass(eq=False)
class Cutoff:
    """Train on each row twice, once whole and once with a part of its embeddings set to zero.

    With e the output of the embedding layer and c(e) the same with a part cut off:

        loss = (L(e) + alpha L(c(e)) + beta JS(p(e), p(c(e)))) / (1 + alpha)

    It is the paper's, divided so that the loss keeps the size of plain training. JS is the Jensen-Shannon divergence.
    `token` cuts single tokens and `span` neighbouring ones, a share `ratio` of a row's perturbable tokens, at least
    one; as in the authors' code attention passes over them, so that nothing is left of them. `feature` cuts a share
    of the coordinates, the same in every token of a row. Both passes share their dropout masks, so that JS is due to
    the cut alone. What is cut is keyed by step and row.

    Hook: `wrap_loss`. Defaults: alpha 1, beta 1, ratio 0.1, from the published 0.05 to 0.3.
    """

    traits: ClassVar[Traits] = Traits(
        family="regularize",
        order=Band.CONSISTENCY,
        requires=("embeddings",),
        effect="js",
        cost="1 more full pass; 2x a plain step",
        paper="Shen et al.: A Simple but Tough-to-Beat Data Augmentation Approach for Natural Language Understanding"
        " and Generation, 2020, arXiv:2009.13818",
        combines="lora, ema, embedding attacks (which are cut too), distill; with r3f or vat it is redundant",
    )

    kind: Literal["token", "feature", "span"] = parameter("span", "what is cut off")
    ratio: float = parameter(0.1, "share of tokens or coordinates that is cut off", gt=0, lt=1)
    alpha: float = parameter(1.0, "factor of the loss without the part", ge=0)
    beta: float = parameter(1.0, "factor of the divergence between the two predictions", ge=0)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The weighted mean of two evaluations, plus their divergence."""
        out = inner(ctx, batch, view)
        cut = inner(ctx, *self._cut(ctx, batch, view))
        whole = 1 + self.alpha
        terms = {k: ((value + self.alpha * cut.terms[k][0]) / whole, unit) for k, (value, unit) in out.terms.items()}
        js = js_rows([out.scores, cut.scores], batch, ctx.run.task)
        ctx.report(self, js=js / batch.size)
        return replace(out, terms={**terms, "cutoff": (self.beta / whole * js, "rows")})

    def _cut(self, ctx: Context, batch: Batch, view: View) -> tuple[Batch, View]:
        """The batch without attention to what is cut, and a view whose delta sets it to zero."""
        inputs, delta = dict(batch.inputs), {}
        for site, x in ctx.embedded(batch, view).items():
            source = ctx.sites.table[site].input
            keyed = ctx.rng(f"cutoff/{source}", batch.rows)
            if self.kind == "feature":
                delta[site] = -x * _lowest(keyed.uniform(x.shape[-1]).to(x.device), self.ratio)[:, None]
                continue
            mask = ctx.mask(batch, site).bool()
            chosen = _chosen(keyed.uniform(mask.shape[1]).to(x.device), mask, self.ratio, self.kind == "span")
            delta[site] = -x * chosen[..., None]
            attention = source.replace("input_ids", "attention_mask")
            if attention in inputs:
                inputs[attention] = inputs[attention].masked_fill(chosen, 0)
        return (batch if self.kind == "feature" else replace(batch, inputs=inputs)), view.plus(delta)


def _chosen(draws: Tensor, mask: Tensor, ratio: float, span: bool) -> Tensor:
    """Which tokens `[B, L]` to cut: draws belong to a row's perturbable tokens in order, wherever padding stands."""
    place = mask.cumsum(1) - 1  # of a perturbable token among its row's
    count = mask.sum(1, keepdim=True)
    number = (ratio * count).long().clamp_min(1)
    if span:
        start = (draws[:, :1] * (count - number + 1)).long()
        return mask & (place >= start) & (place < start + number)
    drawn = draws.gather(1, place.clamp_min(0)).masked_fill(~mask, 2.0)  # draws are below 1
    return mask & (drawn.argsort(1).argsort(1) < number)


def _lowest(draws: Tensor, ratio: float) -> Tensor:
    """The share `ratio` of each row's draws that is lowest, at least one of them."""
    number = max(int(ratio * draws.shape[1]), 1)
    return draws.argsort(1).argsort(1) < number
