"""R3F: smooth predictions around every input, in random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, kl_rows, sequence_norms

__all__ = ["R3F"]


@dataclass(eq=False)
class R3F:
    """Add the symmetric divergence between the prediction and the prediction at noisy embeddings.

    With e the output of the embedding layer and z noise on its perturbable tokens, N(0, sigma²) or U(−sigma, sigma) in
    each coordinate:

        loss += weight (KL(p(e) || p(e + z)) + KL(p(e + z) || p(e)))

    Both predictions carry gradients and share their dropout masks, so the divergence is due to z alone. The term is
    averaged over rows. Ascents of attacks evaluate the task's own loss without it.

    Hook: `wrap_loss`. Defaults: weight 1, of the published 0.1 to 5. The published sigma of 1e-5 changes predictions by
    less than fp32 resolves, and the term then trains nothing; 0.01 is a fifth of a coordinate of BERT-type embeddings.
    """

    name: ClassVar[str] = "r3f"
    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.SMOOTHNESS,
        requires=("embeddings",),
        effect="kl",
        cost="1 more full pass; 2x a plain step (+1x where an inner method stacks its passes)",
        paper="Aghajanyan et al.: Better Fine-Tuning by Reducing Representational Collapse, ICLR 2021",
        combines="lora, ema, episodes; with rdrop or vat it is redundant",
    )

    weight: float = parameter(1.0, "factor of the divergence", ge=0)
    sigma: float = parameter(0.01, "size of the noise in each coordinate", ge=0)
    noise: Literal["normal", "uniform"] = parameter("normal", "distribution of the noise")

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss plus the divergence."""
        out = inner(ctx, batch, view)
        if out.view is not None and out.replay:
            at, clean = out.view, out.scores
        else:  # the masks behind these logits cannot be drawn again
            at, clean = view, ctx.outputs(batch, [view])[0].scores
        noise = self._draw(ctx, batch)
        noisy = ctx.outputs(batch, [at.plus(noise)])[0].scores
        both = 2 * kl_rows(clean, noisy, batch, ctx.run.task, direction="symmetric")
        ctx.report(self, kl=both / batch.size, noise_norm=sequence_norms(noise).mean())
        return replace(out, terms={**out.terms, "r3f": (self.weight * both, "rows")})

    def _draw(self, ctx: Context, batch: Batch) -> dict[str, Tensor]:
        noise = {}
        for site, zero in ctx.zeros(batch).items():
            keyed = ctx.rng(f"r3f/{site}", batch.rows)
            shape = zero.shape[1:]
            draws = keyed.normal(*shape) if self.noise == "normal" else 2 * keyed.uniform(*shape) - 1
            noise[site] = self.sigma * draws.to(zero) * ctx.mask(batch, site).unsqueeze(-1)
        return noise
