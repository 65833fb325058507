"""The core of sharpness-aware minimisation: the gradient at the worst nearby weights, and how it differs from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridengine import kernels
from hybridengine.seams.context import Context
from hybridengine.seams.precision import wide
from hybridengine.seams.types import Work

__all__ = ["Uphill", "gradient_uphill", "orthogonal"]


@dataclass(frozen=True, eq=False)
class Uphill:
    """What is known after both passes.

    Attributes:
        terms: of the pass at w, weighted.
        here: the gradient at w of the weights that moved, where it was asked for.
        distance: how far the weights moved, where it was asked for.
        gain: L(w + e) - L(w); None where the gradient had no direction and nothing moved.
    """

    terms: Mapping[str, Tensor]
    here: dict[str, Tensor] = field(default_factory=dict)
    distance: float | None = None
    gain: Tensor | None = None


def gradient_uphill(
    ctx: Context,
    inner: Callable[[Context, Sequence[Work]], Mapping[str, Tensor]],
    works: Sequence[Work],
    *,
    rho: float,
    rule: kernels.Rule = "sam",
    eta: float = 0.0,
    keep: bool = False,
    measure: bool = False,
) -> Uphill:
    """Leave dL(w + e)/dw in `.grad`, e the worst move of size rho in first order; for `wrap_gradient`.

    Two inner passes over all micro-batches. The weights are restored from a copy, to the bit. Where the gradient at w
    is zero or not finite nothing moves, and it is left in `.grad`.

    Args:
        rho, rule, eta: the move, as `kernels.perturb_weights` defines it.
        keep: return the gradient at w; else its memory is free for the second pass.
        measure: return the distance, which may cost a pass over all weights.
    """
    terms = inner(ctx, works)
    gradient, weights = ctx.take_grads(), ctx.run.perturbed()
    uphill = {name: g for name, g in gradient.items() if name in weights}
    moved = ctx.ascend_weights(uphill, rho=rho, rule=rule, eta=eta)
    if not moved.usable:
        ctx.add_grads(gradient)
        return Uphill(terms)
    here = uphill if keep else {}
    del gradient, uphill
    with moved:
        distance = moved.distance() if measure else None
        there = inner(ctx, works)
    gain = torch.stack([*there.values()]).sum() - torch.stack([*terms.values()]).sum()
    return Uphill(terms, here, distance, gain)


def orthogonal(gradient: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a gradient at right angles to another, g - (g . t) / ||t||^2 t, in at least fp32.

    Product and norm are taken over all tensors that both have. Where t is 0 the whole g is.
    """
    both = [name for name in gradient if name in to]
    squares = sum(wide(to[name]).square().sum() for name in both)
    product = sum((wide(gradient[name]) * wide(to[name])).sum() for name in both)
    share = product / squares if squares > 0 else 0.0 * product
    return {name: wide(gradient[name]) - share * wide(to[name]) for name in both}
