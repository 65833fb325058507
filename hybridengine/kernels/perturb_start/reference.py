"""The specification of the random start, in plain torch.

For each sequence, with n the numbers that its mask keeps, over all its positions and sites:

    L2:    delta = (2 u - 1) epsilon / sqrt(n)         so ||delta|| <= epsilon, about 0.58 epsilon for many numbers
    Linf:  delta = (2 u - 1) epsilon

as FreeLB and Madry's PGD start. By token, each token of each site stands for a sequence. Masked positions are 0.
Computed in float32 (float64 for float64), epsilon times the rounded 1 / sqrt(n), and rounded once to u's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.native import accumulator_dtype
from hybridengine.kernels.perturb_start.draws import Draws

__all__ = ["run"]


@torch.no_grad()
def run(sites: list[Draws], epsilon: float, linf: bool) -> list[Tensor]:
    """Return the delta of each site."""
    record("perturb_start", "reference")
    dtype = accumulator_dtype(sites[0].uniform.dtype)
    counts = torch.stack([site.mask.sum(1) * site.uniform.shape[-1] for site in sites]).sum(0).to(dtype)
    scale = torch.full_like(counts, epsilon) if linf else epsilon * counts.clamp_min(1).sqrt().reciprocal()
    results = []
    for site in sites:
        delta = (2 * site.uniform.to(dtype) - 1) * scale.view(-1, 1, 1)
        # `where`, not a product: a masked NaN must vanish.
        results.append(torch.where(site.mask.unsqueeze(-1), delta, 0).to(site.uniform.dtype))
    return results
