"""SMART and ALUM: smooth predictions around every token, and updates that trust the last weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hybridengine.plugin import Attack, Band, Traits, hook, parameter
from hybridengine.seams import (
    Average,
    Batch,
    Context,
    Out,
    Term,
    View,
    Work,
    keyed_noise,
    kl_rows,
    power_iteration,
    replayable,
    sequence_norms,
)

__all__ = ["ALUM", "SMART"]


@dataclass(eq=False)
class ALUM(Attack):
    """Add the divergence between the prediction and the prediction where every token has moved against it.

    With e the output of the embedding layer, D(p, q) = KL(p || q) + KL(q || p), and maxima over a token's coordinates:

        delta_0 = sigma N(0, 1);        g = dD(p(e), p(e + delta)) / d delta
        delta <- clamp(delta + step_size g / max |g|, -epsilon, epsilon)        (`steps` times)
        loss += weight D(p(e), p(e + delta))

    Each token moves by its own scale, where `vat` moves a sequence by one. The first prediction is fixed while delta is
    sought, and has its gradient in the loss. All passes share their dropout masks; the term is averaged over rows.

    Hook: `wrap_loss`. Defaults: weight 1 for fine-tuning (10 for pre-training), 1 step. The published sizes (sigma and
    epsilon 1e-5, step_size 1e-3) fit neither each other, as a step leaves the box, nor bf16, where a start of 1e-5 has
    a random gradient. Here the start is `r3f`'s noise: at sigma 0.01, a fifth of a coordinate of BERT-type embeddings,
    the direction is right both in fp32 (larger starts see curvature) and under bf16 autocast (smaller ones drown in
    rounding); the step takes the largest coordinate of each token to the edge of a box twice as wide.
    """

    name: ClassVar[str] = "alum"
    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.SMOOTHNESS,
        requires=("embeddings",),
        effect="kl",
        cost="1 more full pass, and a forward with a delta-only backward per step; with 1 step 2.67x a plain step"
        " (+0.33x where an inner method stacks its passes)",
        paper="Liu et al.: Adversarial Training for Large Neural Language Models, 2020, arXiv:2004.08994",
        combines="lora, ema, sam; with rdrop, vat or r3f it is redundant",
    )

    weight: float = parameter(1.0, "factor of the divergence", ge=0)
    sigma: float = parameter(0.01, "size of the random start in each coordinate", gt=0)
    step_size: float = parameter(0.02, "how far the coordinate of a token with the largest gradient moves", gt=0)
    epsilon: float = parameter(0.02, "half width of the box around each token", ge=0)
    steps: int = parameter(1, "ascent steps", ge=1)
    per: Literal["sequence", "token"] = field(default="token", init=False, repr=False)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss plus the divergence from the prediction at the worst neighbour."""
        out = inner(ctx, batch, view)
        at, clean = replayable(ctx, batch, view, out)
        fixed = clean.detach()

        def apart(p: Tensor, delta: Mapping[str, Tensor]) -> Tensor:
            return self._divergence(ctx, batch, p, ctx.outputs(batch, [at.plus(delta)])[0].scores)

        start = {site: self.sigma * noise for site, noise in keyed_noise(ctx, batch, self.name).items()}
        masks = [ctx.mask(batch, site).unsqueeze(-1) != 0 for site in start]
        delta = power_iteration(
            ctx, lambda d: apart(fixed, d), start, lambda d, g: self._move(ctx, d, g, masks), steps=self.steps
        )
        value = apart(clean, delta)
        ctx.report(self, kl=value / batch.size, delta_norm=sequence_norms(delta).mean())
        terms: dict[str, Term] = {**out.terms, self.name: (self.weight * value, "rows")}
        return replace(out, terms={**terms, **self._further_terms(ctx, batch, at, clean)})

    def _divergence(self, ctx: Context, batch: Batch, p: Tensor, q: Tensor) -> Tensor:
        return 2 * kl_rows(p, q, batch, ctx.run.task, direction="symmetric")

    def _move(
        self, ctx: Context, delta: Mapping[str, Tensor], gradient: Sequence[Tensor | None], masks: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """One step within the box; a token whose gradient is zero or not finite stays where it is."""
        share, moved = self.strength(ctx.run.step), {}
        for (site, d), g, mask in zip(delta.items(), gradient, masks, strict=True):
            d = d.detach()
            g = torch.zeros_like(d) if g is None else torch.where(mask, g, 0)
            largest = g.abs().amax(-1, keepdim=True)
            step = torch.where((largest > 0) & largest.isfinite(), share * self.step_size * (g / largest), 0)
            moved[site] = (d + step).clamp(-share * self.epsilon, share * self.epsilon).to(d.dtype)
        return moved

    def _further_terms(self, ctx: Context, batch: Batch, view: View, clean: Tensor) -> dict[str, Term]:
        return {}


@dataclass(eq=False)
class SMART(ALUM):
    """ALUM's smoothness, and a second divergence that keeps each update near where the weights have been.

    With D, delta and p as in `alum`, w the weights, w' their running average, beta its `decay`:

        loss += weight D(p_w(e), p_w(e + delta)) + proximal D(p_w(e), p_w'(e))
        w' <- beta w' + (1 - beta) w        after each update, w' = w at first

    The second term is the Bregman proximal point method: a step of the size that the predictions' geometry allows, not
    the weights'. The average sees the clean input under the same dropout masks, and has no gradient. It is kept in at
    least fp32 and in checkpoints; weights that a schedule thaws later join it then. `proximal: 0` is `alum`, and keeps
    no average.

    Hooks: `wrap_loss`, `wrap_step`. Defaults: weight and proximal 1, decay 0.99 as in the paper (0.999 late in a run).
    """

    name: ClassVar[str] = "smart"
    traits: ClassVar[Traits] = replace(
        ALUM.traits,
        requires=("embeddings", "functional"),
        cost="1 more full pass, a forward, and a forward with a delta-only backward per step; with 1 step 3x a plain"
        " step; a copy of the trainable weights (+0.33x where an inner method stacks its passes)",
        state=1,
        paper="Jiang et al.: SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models, ACL 2020",
    )

    proximal: float = parameter(1.0, "factor of the divergence from the average's prediction; 0 leaves it out", ge=0)
    decay: float = parameter(0.99, "how much of the average survives a step", ge=0, lt=1)

    def _further_terms(self, ctx: Context, batch: Batch, view: View, clean: Tensor) -> dict[str, Term]:
        if not self.proximal:
            return {}
        with torch.no_grad():
            there = view.clean().with_params(Average(ctx.run, "smart").parameters())
            before = ctx.outputs(batch, [there])[0].scores
        value = self._divergence(ctx, batch, clean, before)
        ctx.report(self, proximal_kl=value / batch.size)
        return {"smart_proximal": (self.proximal * value, "rows")}

    @hook
    def wrap_step(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """The inner step, then the average follows the moved weights."""
        if not self.proximal:
            return inner(ctx, works)
        average = Average(ctx.run, "smart")
        average.join()
        terms = inner(ctx, works)
        average.follow(rate=1 - self.decay)
        return terms
