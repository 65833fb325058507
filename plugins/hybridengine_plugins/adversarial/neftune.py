"""NEFTune: uniform noise on the embeddings during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from hybridengine import kernels
from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Batch, Context, Out, View, sequence_norms

__all__ = ["NEFTune"]


@dataclass(eq=False)
class NEFTune:
    """Train on embeddings with fresh uniform noise.

    With e the output of the embedding layer, n perturbable tokens of width D in a sequence:

        e' = e + alpha U(−1, 1) / √(n D)

    n counts real tokens, so padding neither changes the noise nor gets any (the Trainer of transformers counts the
    padded length, and its noise depends on the batch). Ascents of attacks and inner loops evaluate the task's own loss
    and see no noise; the passes that train do. Noise is keyed by step and row.

    Hook: `wrap_loss`. Default: alpha 5, the smallest of the paper (5 to 15). A token moves by alpha / √(3n): of 32
    tokens each by 0.5, where word vectors of BERT-type models have norms of 1.0 to 1.5.
    """

    name: ClassVar[str] = "neftune"
    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.TERM,
        requires=("embeddings",),
        effect="noise_norm",
        paper="Jain et al.: NEFTune: Noisy Embeddings Improve Instruction Finetuning, ICLR 2024",
        combines="lora, ema, sam; beside an embedding attack it is redundant",
    )

    alpha: float = parameter(5.0, "size of the noise", ge=0)

    @hook
    def wrap_loss(self, inner: Callable[..., Out], ctx: Context, batch: Batch, view: View) -> Out:
        """The inner loss at the noisy embeddings."""
        zero = ctx.zeros(batch)
        draws = {site: ctx.rng(f"neftune/{site}", batch.rows).uniform(*z.shape[1:]).to(z) for site, z in zero.items()}
        noise = kernels.perturb_start(draws, {site: ctx.mask(batch, site) for site in zero}, epsilon=self.alpha)
        ctx.report(self, noise_norm=sequence_norms(noise).mean())
        return inner(ctx, batch, view.plus(noise))
