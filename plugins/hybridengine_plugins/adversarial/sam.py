"""SAM: the gradient at the worst nearby weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work

__all__ = ["ASAM", "SAM"]

_MEASURE_EVERY = 10  # steps between measurements of the norm, each a pass over all weights


@dataclass(eq=False)
class SAM:
    """Minimise the loss of the whole neighbourhood of the weights, to end in flat minima.

    With g = dL(w)/dw over all micro-batches of the step and the norm over all perturbed parameters:

        e = rho g / ||g||
        gradient = dL(w + e)/dw

    The weights are restored from a copy, to the bit. Where ||g|| is zero or not finite nothing is perturbed. The
    reported loss is that at w.

    Hook: `wrap_gradient`. Default: rho 0.05 as in the paper (0.05 to 0.15 for language models).
    """

    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.WEIGHT_PERTURBATION,
        slots=("weight_perturbation",),
        effect="perturbation_norm",
        cost="the inner passes twice, and a copy of the trainable weights; 2x a plain step",
        state=1,
        paper="Foret et al.: Sharpness-Aware Minimization, ICLR 2021",
        combines="lora, ema, rdrop; it doubles the cost of an embedding attack; not with another weight perturbation",
    )

    rho: float = parameter(0.05, "radius of the neighbourhood", ge=0)

    @hook
    def wrap_gradient(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Gradient at w, move, gradient at w + e."""
        terms = inner(ctx, works)
        gradient = ctx.take_grads()
        weights = ctx.run.perturbed()
        uphill = {name: g for name, g in gradient.items() if name in weights}
        moved = ctx.ascend_weights(uphill, rho=self.rho, **self._rule())
        if not moved.usable:
            ctx.add_grads(gradient)
            return terms
        del gradient, uphill  # their memory is free for the second pass
        with moved:
            if ctx.run.step % _MEASURE_EVERY == 0:
                ctx.report(self, perturbation_norm=moved.distance())
            there = inner(ctx, works)
        ctx.report(self, loss_gain=sum(there.values()) - sum(terms.values()))
        return terms

    def _rule(self) -> dict[str, Any]:
        return {"rule": "sam"}


@dataclass(eq=False)
class ASAM(SAM):
    """Minimise the loss of a neighbourhood that is as wide in each weight as the weight is large.

    With g = dL(w)/dw over all micro-batches of the step, T = |w| + eta elementwise, and the norm over all perturbed
    parameters:

        e = rho T^2 g / ||T g||
        gradient = dL(w + e)/dw

    Networks that rescale one layer up and the next one down compute the same; their neighbourhoods are the same here,
    but not with `sam`. The weights are restored to the bit. The reported loss is that at w.

    Hook: `wrap_gradient`. Defaults: rho 0.5, about ten times `sam`'s, and eta 0.01, as in the paper.
    """

    traits: ClassVar[Traits] = replace(
        SAM.traits, paper="Kwon et al.: ASAM: Adaptive Sharpness-Aware Minimization, ICML 2021"
    )

    rho: float = parameter(0.5, "radius of the neighbourhood, relative to the weights", ge=0)
    eta: float = parameter(0.01, "what is added to each weight's size", ge=0)

    def _rule(self) -> dict[str, Any]:
        return {"rule": "asam", "eta": self.eta}
