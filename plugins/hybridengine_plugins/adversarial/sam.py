"""SAM: the gradient at the worst nearby weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work

__all__ = ["SAM"]

_MEASURE_EVERY = 10  # steps between measurements of the norm, each a pass over all weights


@dataclass(eq=False)
class SAM:
    """Minimise the loss of the whole neighbourhood of the weights, to end in flat minima.

    With g = dL(w)/dw over all micro-batches of the step and the norm over all perturbed parameters:

        e = rho g / ||g||                              (SAM)
        e = rho T^2 g / ||T g||,    T = |w| + eta      (adaptive: ASAM, invariant to rescaled layers)
        gradient = dL(w + e)/dw

    The weights are restored from a copy, to the bit. Where ||g|| is zero or not finite nothing is perturbed. The
    reported loss is that at w.

    Hook: `wrap_gradient`. Defaults: rho 0.05 as in the paper (0.05 to 0.15 for language models; ASAM takes about ten
    times as much).
    """

    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.WEIGHT_PERTURBATION,
        slots=("weight_perturbation",),
        effect="perturbation_norm",
        cost="the inner passes twice, and a copy of the trainable weights; 2x a plain step",
        state=1,
        paper="Foret et al.: Sharpness-Aware Minimization, ICLR 2021; Kwon et al.: ASAM, ICML 2021",
        combines="lora, ema, rdrop; it doubles the cost of an embedding attack; not with another weight perturbation",
    )

    rho: float = parameter(0.05, "radius of the neighbourhood", ge=0)
    adaptive: bool = parameter(False, "ASAM: measure the radius relative to each weight's size")
    eta: float = parameter(0.01, "what ASAM adds to each weight's size", ge=0)

    @hook
    def wrap_gradient(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """Gradient at w, move, gradient at w + e."""
        terms = inner(ctx, works)
        gradient = ctx.take_grads()
        weights = ctx.run.perturbed()
        uphill = {name: g for name, g in gradient.items() if name in weights}
        moved = ctx.ascend_weights(uphill, rho=self.rho, rule="asam" if self.adaptive else "sam", eta=self.eta)
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
