"""SAM: the gradient at the worst nearby weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work, gradient_uphill, orthogonal, wide

__all__ = ["ASAM", "AWP", "GSAM", "SAM"]

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
        measure = ctx.run.step % _MEASURE_EVERY < 2  # at the first step LoRA's B is 0, and AWP moves it nowhere
        found = gradient_uphill(ctx, inner, works, rho=self.rho, measure=measure, **self._options())
        if found.distance is not None:
            ctx.report(self, perturbation_norm=found.distance)
        if found.gain is not None:
            ctx.report(self, loss_gain=found.gain)
        if found.here:
            self._combine(ctx, found.here)
        return found.terms

    def _options(self) -> dict[str, Any]:
        """How the weights move, and whether the gradient at w is needed after the second pass."""
        return {"rule": "sam"}

    def _combine(self, ctx: Context, here: dict[str, Tensor]) -> None:
        """Make the step's gradient from that at w + e, in `.grad`, and that at w."""


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

    def _options(self) -> dict[str, Any]:
        return {"rule": "asam", "eta": self.eta}


@dataclass(eq=False)
class GSAM(SAM):
    """SAM that also closes the gap between the loss nearby and the loss here, without climbing.

    With g = dL(w)/dw and g_p = dL(w + e)/dw, e as in `sam`, norms and products over all perturbed parameters:

        g_perp = g - (g . g_p) / ||g_p||^2 g_p        the part of g that leaves L(w + e) alone
        gradient = g_p - alpha g_perp

    The gap L(w + e) - L(w) measures sharpness better than L(w + e) itself; stepping uphill along g_perp narrows it. At
    alpha 0 it is `sam`. The weights are restored to the bit. The reported loss is that at w.

    Hook: `wrap_gradient`. Defaults: rho 0.05, alpha 0.1 (paper: 0.1 to 0.4).
    """

    traits: ClassVar[Traits] = replace(
        SAM.traits,
        cost="the inner passes twice, a copy of the trainable weights and of their gradient; 2x a plain step",
        state=2,
        paper="Zhuang et al.: Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022",
    )

    alpha: float = parameter(0.1, "step along the part of the gradient that only narrows the gap", ge=0)

    def _options(self) -> dict[str, Any]:
        return {"rule": "sam", "keep": self.alpha > 0}

    def _combine(self, ctx: Context, here: dict[str, Tensor]) -> None:
        near = ctx.take_grads()
        rest = orthogonal(here, near)
        if ctx.run.step % _MEASURE_EVERY == 0:
            ctx.report(self, gap_norm=torch.nn.utils.get_total_norm(list(rest.values())))
        ctx.add_grads({**near, **{name: wide(near[name]) - self.alpha * value for name, value in rest.items()}})


@dataclass(eq=False)
class AWP(SAM):
    """Train at weights that are perturbed matrix by matrix, on the inputs that an attack inside has made.

    With w_l a tensor, g_l its gradient over all micro-batches of the step:

        v_l = gamma ||w_l|| g_l / ||g_l||
        gradient = dL(w + v)/dw

    An embedding attack inside finds its perturbation once, at w, and both passes train on it: the game of the paper,
    in which input and weights are moved against the loss. Without an attack it is SAM by the tensor. Start late, when
    the model fits. The weights are restored to the bit. The reported loss is that at w.

    Hook: `wrap_gradient`. Default: gamma 0.005 as in the paper (0.001 to 0.01).
    """

    traits: ClassVar[Traits] = replace(
        SAM.traits,
        cost="the inner passes twice, an attack inside once, and a copy of the trainable weights; 2x a plain step",
        paper="Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020",
        combines="fgm, pgd, rdrop, ema, lora; not with another weight perturbation",
    )

    rho: float = parameter(0.005, "gamma: length of each tensor's move, relative to the tensor", ge=0)
    start: int = parameter(0, "first optimizer step that is perturbed", ge=0)

    def active(self, step: int) -> bool:
        """Whether the weights are perturbed at this step."""
        return step >= self.start

    @hook
    def wrap_gradient(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """SAM's two passes; the attack inside is that of the first."""
        with ctx.sharing():
            return SAM.wrap_gradient(self, inner, ctx, works)

    def _options(self) -> dict[str, Any]:
        return {"rule": "awp"}
