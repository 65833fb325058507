"""The specification of the perturbation step, in plain torch.

For each sequence, with g the gradient where the mask keeps and 0 elsewhere, norms over all its positions and sites:

    L2:    z = delta + step_size g / ||g||            (no step if g = 0)
           delta' = z min(1, epsilon / ||z||)         (no projection without epsilon)
    Linf:  delta' = clamp(delta + step_size sign(g), -epsilon, epsilon)

By token, each token of each site stands for a sequence. A sequence whose g is not finite keeps its delta. Masked
positions become 0. Computed in float32 (float64 for float64) and rounded once to delta's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype
from hybridengine.kernels.perturb.site import Site

__all__ = ["run"]


@torch.no_grad()
def run(sites: list[Site], step_size: float, epsilon: float | None, linf: bool) -> list[Tensor]:
    """Return the new delta of each site."""
    record("perturb", "reference")
    dtype = accumulator_dtype(sites[0].delta.dtype)
    keep = [site.mask.unsqueeze(-1) for site in sites]
    # `where`, not a product: a masked NaN must vanish.
    g = [torch.where(kept, site.gradient, 0).to(dtype) for kept, site in zip(keep, sites, strict=True)]
    d = [torch.where(kept, site.delta, 0).to(dtype) for kept, site in zip(keep, sites, strict=True)]
    largest = _largest(g)
    if linf:
        moved = [old + step_size * direction.sign() for old, direction in zip(d, g, strict=True)]
        if epsilon is not None:
            moved = [one.clamp(-epsilon, epsilon) for one in moved]
    else:
        moved = _l2_step(d, g, largest, step_size, epsilon)
    finite = largest.isfinite()  # the maximum is NaN where any entry is
    chosen = [torch.where(finite, new, old) for new, old in zip(moved, d, strict=True)]
    return [one.to(site.delta.dtype) for one, site in zip(chosen, sites, strict=True)]


def _l2_step(
    d: list[Tensor], g: list[Tensor], largest: Tensor, step_size: float, epsilon: float | None
) -> list[Tensor]:
    # Divided by its largest entry first, no gradient is so large or so small that its square leaves the number range.
    direction = [one / torch.where(largest > 0, largest, 1) for one in g]
    norm = _norm(direction)
    rate = torch.where(norm > 0, step_size / norm, 0)
    moved = [old + rate * one for old, one in zip(d, direction, strict=True)]
    if epsilon is None:
        return moved
    size = _norm(moved)
    shrink = torch.where(size > epsilon, epsilon / size, 1)
    return [one * shrink for one in moved]


def _largest(sites: list[Tensor]) -> Tensor:
    """Return the largest absolute entry of each sequence over all sites, [B, 1, 1]."""
    filled = [one.abs().amax((1, 2)) for one in sites if one.numel()]
    if not filled:
        return sites[0].new_zeros(sites[0].shape[0], 1, 1)
    return torch.stack(filled).amax(0).view(-1, 1, 1)


def _norm(sites: list[Tensor]) -> Tensor:
    """Return the L2 norm of each sequence over all sites, [B, 1, 1]."""
    squares = [one.square().flatten(1).sum(1) for one in sites]
    return torch.stack(squares).sum(0).sqrt().view(-1, 1, 1)
