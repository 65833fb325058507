"""VAT: smooth predictions around every input, labelled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import Attack, Band, Traits, hook, parameter
from hybridengine.seams import (
    Batch,
    Context,
    Out,
    View,
    keyed_noise,
    kl_rows,
    power_iteration,
    replayable,
    sequence_norms,
)

__all__ = ["VAT"]


@dataclass(eq=False)
class VAT(Attack):
    """Add the divergence between the prediction and the prediction at the direction that changes it most.

    With e the output of the embedding layer, p(e) the predicted distribution without gradient, d_0 random noise and
    norms per sequence over its perturbable tokens:

        d <- xi d / ||d||;    g = d KL(p(e) || p(e + d)) / dd;    d <- g        (`steps` times: power iteration)
        r = epsilon g / ||g||
        loss += weight KL(p(e) || p(e + r))

    The term needs no labels: rows of `data.unlabelled` are smoothed too, and it is averaged over all rows. Clean and
    perturbed passes share their dropout masks, so the divergence is due to r alone.

    Multi-label tasks put a sigmoid in the place of the softmax and sum over the labels.

    Hook: `wrap_loss`. Defaults: epsilon 0.3 per sequence, about a quarter of a word's vector in BERT-type models (their
    norms are 1.0 to 1.5), as in the paper on text, whose 5 is a third of its vectors of 256 entries of variance 1. It
    may exceed fgm's 0.1: the clean loss keeps its full weight, and the term grows with epsilon squared. xi 0.3 lies in
    the window where the finite difference has the right direction both in fp32 (larger ones see curvature) and under
    bf16 autocast (smaller ones drown in rounding: published values of 1e-5 give a random direction there).
    """

    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.SMOOTHNESS,
        requires=("embeddings",),
        effect="kl",
        cost="1 more full pass, and a forward with a delta-only backward per step; with 1 step 2.67x a plain step"
        " (+0.33x where an inner method stacks its passes); unlabelled rows cost one forward more",
        paper="Miyato et al.: Virtual Adversarial Training, TPAMI 2018; for text: Miyato, Dai, Goodfellow, ICLR 2017",
        combines="unlabelled data, lora, ema, episodes; with rdrop it is redundant",
    )

    weight: float = parameter(1.0, "factor of the divergence", ge=0)
    epsilon: float = parameter(0.3, "radius of the perturbation per sequence", ge=0)
    xi: float = parameter(0.3, "radius of the probe that measures the direction, per sequence", gt=0)
    steps: int = parameter(1, "power iterations", ge=1)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss plus the smoothness of the batch and of its unlabelled part."""
        out = inner(ctx, batch, view)
        with torch.no_grad():
            at, clean = replayable(ctx, batch, view, out)
        smooth = self._divergence(ctx, batch, at, clean.detach())
        terms = {**out.terms, "vat": (self.weight * smooth, "all_rows")}
        if (part := batch.parts.get("unlabelled")) is not None:
            other = view.clean().fork("unlabelled")
            with torch.no_grad():
                clean = ctx.outputs(part, [other])[0].scores
            smooth = self._divergence(ctx, part, other, clean)
            terms["vat_unlabelled"] = (self.weight * smooth, "all_rows")
        return replace(out, terms=terms)

    def _divergence(self, ctx: Context, batch: Batch, view: View, clean: Tensor) -> Tensor:
        zero = ctx.zeros(batch)

        def kl(delta: Mapping[str, Tensor]) -> Tensor:
            return kl_rows(clean, ctx.outputs(batch, [view.plus(delta)])[0].scores, batch, ctx.run.task)

        def probe(_: Mapping[str, Tensor], direction: Sequence[Tensor | None]) -> dict[str, Tensor]:
            return ctx.ascend(batch, zero, direction, step_size=self.xi, per=self.per)

        start = probe(zero, list(keyed_noise(ctx, batch, "vat").values()))
        found = power_iteration(ctx, kl, start, probe, steps=self.steps)
        attack = self.ascend(ctx, batch, zero, list(found.values()), step_size=self.epsilon)
        value = kl(attack)
        ctx.report(self, kl=value / batch.size, delta_norm=sequence_norms(attack).mean())
        return value
