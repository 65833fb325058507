"""LookSAM: SAM's second pass every few steps alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hybridengine.plugin import Band, Traits, hook, parameter
from hybridengine.seams import Context, Work, gradient_uphill, orthogonal, wide

__all__ = ["LookSAM"]


@dataclass(eq=False)
class LookSAM:
    """SAM at little more than the cost of plain training: what makes it flat changes slowly, and is used again.

    With g = dL(w)/dw and, every `every` steps, g_s = dL(w + e)/dw, e as in `sam`, norms and products over all perturbed
    parameters:

        g_v = g_s - (g_s . g) / ||g||^2 g                 the part of g_s that plain descent has not
        gradient = g_s                                    in these steps
        gradient = g + alpha ||g|| g_v / ||g_v||          in the steps between, with the last g_v

    The direction of g_v is kept in at least fp32 and in checkpoints; weights that a schedule thaws later join it at the
    next of these steps. With `every: 1` it is `sam`. The weights are restored to the bit. The reported loss is that at
    w. Where g_s has no such part beyond rounding (rho 0), the steps between are plain.

    Hook: `wrap_gradient`. Defaults: rho 0.05 as `sam`; every 5 and alpha 0.7 as in the paper (2 to 10, 0.5 to 1).
    """

    name: ClassVar[str] = "look-sam"
    traits: ClassVar[Traits] = Traits(
        family="adversarial",
        order=Band.WEIGHT_PERTURBATION,
        slots=("weight_perturbation",),
        effect="orthogonal_share",
        cost="the inner passes twice in every `every`-th step: 1.2x a plain step with 5; in these steps copies of the"
        " trainable weights and of their gradient, and one copy kept between them",
        state=3,
        paper="Liu et al.: Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022",
        combines="lora, ema, rdrop, and an embedding attack at little cost; not with another weight perturbation",
    )

    # Up to 20, for its effect is measured in these steps alone, and so many without any stop a run.
    every: int = parameter(5, "steps from one second pass to the next", ge=1, le=20)
    rho: float = parameter(0.05, "radius of the neighbourhood", ge=0)
    alpha: float = parameter(0.7, "how much of the kept direction is added, relative to the gradient", ge=0)

    @property
    def period(self) -> int:
        """Steps after which its passes repeat."""
        return self.every

    @hook
    def wrap_gradient(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        """SAM's two passes when it is their turn; else one pass, pushed along the kept direction."""
        if ctx.run.step % self.every == 0:
            return self._look(inner, ctx, works)
        terms = inner(ctx, works)
        flat, gradient = ctx.run.state("look-sam"), ctx.take_grads()
        push = self.alpha * _norm(g for name, g in gradient.items() if name in flat)
        ctx.add_grads({name: wide(g) + push * flat[name] if name in flat else g for name, g in gradient.items()})
        return terms

    def _look(
        self, inner: Callable[..., Mapping[str, Tensor]], ctx: Context, works: Sequence[Work]
    ) -> Mapping[str, Tensor]:
        flat = ctx.run.state("look-sam")
        flat.clear()
        found = gradient_uphill(ctx, inner, works, rho=self.rho, keep=True, measure=True)
        if not found.here or found.gain is None or found.distance is None:
            return found.terms
        near = ctx.take_grads()
        rest = orthogonal(near, found.here)
        whole, part = float(_norm(near[name] for name in rest)), float(_norm(rest.values()))
        ctx.add_grads(near)
        rounding = 16 * max(torch.finfo(g.dtype).eps for g in rest.values())
        if math.isfinite(part) and part > rounding * whole:
            flat.update({name: g / part for name, g in rest.items()})
            ctx.report(self, orthogonal_share=part / whole)
        ctx.report(self, perturbation_norm=found.distance, loss_gain=found.gain)
        return found.terms


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm([wide(tensor) for tensor in tensors])
