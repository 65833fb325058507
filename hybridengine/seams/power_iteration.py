"""What methods that smooth predictions share: keyed noise, a view to come back to, and the search for the worst place.

Near zero a divergence D(d) between the predictions at e and at e + d is d' H d / 2 with gradient H d. Moving to the
normalised gradient again and again is therefore the power iteration for the first eigenvector of H, the direction in
which predictions change most (VAT); a step along it is an ascent (SMART, ALUM).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from hybridengine.seams.context import Context
from hybridengine.seams.types import Batch, Out, View

__all__ = ["keyed_noise", "power_iteration", "replayable"]


def power_iteration(
    ctx: Context,
    divergence: Callable[[Mapping[str, Tensor]], Tensor],
    start: Mapping[str, Tensor],
    move: Callable[[Mapping[str, Tensor], Sequence[Tensor | None]], dict[str, Tensor]],
    *,
    steps: int,
) -> dict[str, Tensor]:
    """Follow the gradient of a divergence from `start`: d <- move(d, dD(d)/dd), `steps` times.

    Costs a forward and a delta-only backward a step; no weight gradient is computed and no `.grad` touched. At exactly
    0 the gradient is 0, so `start` must lie elsewhere, at a distance that serves as a finite difference. Measured on
    directions against double precision, on coordinates of some 0.05: from 0.02 each curvature turns them; too near,
    rounding does, in single precision below 1e-6, under bfloat16 autocast below 0.005. The published 1e-5 gives a
    random direction there.

    Args:
        divergence: a scalar for deltas `[B, L, D]` by site, e.g. `kl_rows` of clean and moved logits.
        start: the first deltas.
        move: the next deltas for the present ones and their gradients (unscaled, at least fp32, None where unused).
            It returns tensors without a graph, as `ctx.ascend` does.
    """
    delta = dict(start)
    for _ in range(steps):
        leaves = {site: d.detach().requires_grad_() for site, d in delta.items()}
        delta = move(leaves, ctx.grad(divergence(leaves), list(leaves.values())))
    return delta


def keyed_noise(
    ctx: Context, batch: Batch, stream: str, distribution: Literal["normal", "uniform"] = "normal"
) -> dict[str, Tensor]:
    """Noise `[B, L, D]` for each site: standard normal, or uniform in [-1, 1); 0 where nothing may be perturbed.

    It is a function of seed, optimizer step, row and `stream/site`: neither other rows nor padding change it.
    """
    noise = {}
    for site, zero in ctx.zeros(batch).items():
        keyed, shape = ctx.rng(f"{stream}/{site}", batch.rows), zero.shape[1:]
        draws = keyed.normal(*shape) if distribution == "normal" else 2 * keyed.uniform(*shape) - 1
        noise[site] = draws.to(zero) * ctx.mask(batch, site).unsqueeze(-1)
    return noise


def replayable(ctx: Context, batch: Batch, view: View, out: Out) -> tuple[View, Tensor]:
    """A view whose dropout masks can be drawn again, and the logits `[B, ...]` under it.

    They are those of `out`, an evaluation of `batch` under `view`, unless it stacked several passes: their masks cannot
    be drawn again, and one more forward is made.
    """
    if out.view is not None and out.replay:
        return out.view, out.scores
    return view, ctx.outputs(batch, [view])[0].scores
