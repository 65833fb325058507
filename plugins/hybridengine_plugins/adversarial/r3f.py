"""R3F: smooth predictions around every input, in random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, keyed_noise, kl_rows, replayable, sequence_norms

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
        at, clean = replayable(ctx, batch, view, out)
        noise = {site: self.sigma * z for site, z in keyed_noise(ctx, batch, "r3f", self.noise).items()}
        noisy = ctx.outputs(batch, [at.plus(noise)])[0].scores
        both = 2 * kl_rows(clean, noisy, batch, ctx.run.task, direction="symmetric")
        ctx.report(self, kl=both / batch.size, noise_norm=sequence_norms(noise).mean())
        return replace(out, terms={**out.terms, "r3f": (self.weight * both, "rows")})
