"""FGM: one adversarial step on the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from hybridengine.plugin import Band, TargetedAttack, Traits, hook, parameter
from hybridengine.seams import Context, Work, add_terms, sequence_norms

__all__ = ["FGM", "FGSM"]


@dataclass(eq=False)
class FGM(TargetedAttack):
    """Train on the clean input and on the input moved one step uphill in embedding space.

    With e the output of the embedding layer and g = dL/de at the clean input, norms per sequence over its
    perturbable tokens and all embedding sites:

        delta = epsilon g / ||g||_2
        gradient = (1 - weight) dL(e)/dw + weight dL(e + delta)/dw

    One backward of the clean pass gives both its share of the gradient and dL/d delta. `weight: 1` trains on the
    adversarial input alone and finds delta by a backward that computes no weight gradients. `targeted` moves the input
    downhill towards another class, by a pass of its own.

    Hook: `wrap_backward`. Defaults: epsilon 0.1, about a tenth of a word's vector in BERT-type models. The circulating
    recipe's 1.0 is one norm over the whole batch, some 0.18 a row at 32 rows; 1.0 a row can stop a small model from
    learning at all. Weight 0.5 keeps the size of the gradient, which that recipe doubles. Unlike it, this never
    touches the embedding matrix, so it works with frozen, tied, quantised and LoRA-tuned embeddings.
    """

    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.EMBEDDING_ATTACK,
        slots=("embedding_attack",),
        requires=("embeddings",),
        effect="delta_norm",
        cost="2 full passes (weight 1: 1 full and 1 delta-only); a step costs 2x (1.67x) a plain one; targeted 2.67x",
        paper="Miyato et al.: Adversarial Training Methods for Semi-Supervised Text Classification, ICLR 2017",
        combines="lora, rdrop, ema, episodes; with sam it costs 4x; not with another embedding attack",
    )

    _norm: ClassVar[Literal["l2", "linf"]] = "l2"

    epsilon: float = parameter(0.1, "radius of the perturbation per sequence", ge=0)
    weight: float = parameter(0.5, "share of the adversarial gradient; 1 drops the clean one", gt=0, le=1)

    @hook
    def wrap_backward(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, work: Work
    ) -> Mapping[str, Tensor]:
        """Clean pass, delta from its gradient, adversarial pass; returns the weighted terms of both."""
        clean: list[Mapping[str, Tensor]] = []

        def attack() -> dict[str, Tensor]:
            leaves = {site: zero.requires_grad_() for site, zero in ctx.zeros(work.batch).items()}
            if self.weight < 1 and self.targeted is None:
                with ctx.no_sync():
                    clean.append(inner(ctx, work.at(work.view.plus(leaves)).scaled(1 - self.weight)))
                gradient = [leaf.grad for leaf in leaves.values()]
            else:
                _, gradient = self.slope(ctx, work)(leaves)
            return self.ascend(ctx, work.batch, leaves, gradient, step_size=self.epsilon, norm=self._norm)

        delta = ctx.shared("fgm", work, attack)
        if self.weight < 1 and not clean:  # delta came from another loss, or an outer method's earlier pass
            with ctx.no_sync():
                clean.append(inner(ctx, work.scaled(1 - self.weight)))
        adversarial = inner(ctx, work.at(work.view.plus(delta)).scaled(self.weight))
        ctx.report(self, delta_norm=sequence_norms(delta).mean())
        for terms in clean:
            gain = sum(adversarial.values()) / self.weight - sum(terms.values()) / (1 - self.weight)
            ctx.report(self, loss_gain=gain)
        return add_terms(*clean, adversarial)


@dataclass(eq=False)
class FGSM(FGM):
    """Train on the clean input and on the input whose every embedding coordinate moved by the same length uphill.

    With e the output of the embedding layer and g = dL/de at the clean input:

        delta = epsilon sign(g)
        gradient = (1 - weight) dL(e)/dw + weight dL(e + delta)/dw

    All coordinates of a sequence move alike, however small their gradient, where `fgm` moves most what matters most.
    As there, one backward of the clean pass gives both its share of the gradient and dL/d delta.

    Hook: `wrap_backward`. Default: epsilon 0.001 a coordinate, in BERT-type models 0.1 in L2 for some 25 tokens, which
    is `fgm`'s radius.
    """

    traits: ClassVar[Traits] = replace(
        FGM.traits, paper="Goodfellow et al.: Explaining and Harnessing Adversarial Examples, ICLR 2015"
    )
    _norm: ClassVar[Literal["l2", "linf"]] = "linf"

    epsilon: float = parameter(0.001, "size of the perturbation of each coordinate", ge=0)
