"""The masked per-sequence step of embedding attacks (FGM, PGD, FreeLB and kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.perturb import cpu, reference
from hybridengine.kernels.perturb.site import Site

__all__ = ["perturb_step"]

OPERATION = Operation(
    "perturb",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


@overload
def perturb_step(
    delta: Tensor,
    gradient: Tensor,
    mask: Tensor,
    *,
    step_size: float,
    epsilon: float | None = None,
    norm: Literal["l2", "linf"] = "l2",
    impl: str | None = None,
) -> Tensor: ...


@overload
def perturb_step(
    delta: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
    *,
    step_size: float,
    epsilon: float | None = None,
    norm: Literal["l2", "linf"] = "l2",
    impl: str | None = None,
) -> dict[str, Tensor]: ...


def perturb_step(
    delta: Any,
    gradient: Any,
    mask: Any,
    *,
    step_size: float,
    epsilon: float | None = None,
    norm: Literal["l2", "linf"] = "l2",
    impl: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Return the perturbation after one ascent step; norms are per sequence, joint over all sites.

    The formula stands in `reference.py`. Masked positions of the result are exactly 0. A sequence whose gradient is
    zero takes no step; one whose gradient holds NaN or infinity keeps its delta, unprojected. Nothing is read back to
    the host and no graph is recorded. A sequence's result does not depend on the other sequences or on padding.

    Args:
        delta: [B, L, D], or {site: [B, L_site, D_site]}; float32, bfloat16 or float64 natively.
        gradient: of the loss by `delta`, same structure, shapes and dtype. Its scale does not matter.
        mask: [B, L] for each site, bool or 0/1: the positions that may be perturbed.
        step_size: the L2 norm of the step of each sequence, or its size in every coordinate for "linf".
        epsilon: the radius of the ball (L2) or box (Linf) around 0; None does not project.
        norm: "l2" or "linf".
        impl: "cpu" or "reference" instead of the automatic choice.

    Returns:
        A new tensor, or {site: tensor}, in delta's dtype. ||delta|| <= epsilon holds up to its rounding to that dtype.

    Raises:
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for shapes or sites that do not match, an unknown `norm`, a negative or NaN size.
    """
    if norm not in ("l2", "linf"):
        raise ValueError(f"norm must be 'l2' or 'linf', not {norm!r}")
    if not step_size >= 0 or not (epsilon is None or epsilon >= 0):
        raise ValueError(f"step_size and epsilon must not be negative, got {step_size} and {epsilon}")
    single = isinstance(delta, Tensor)
    names = ("",) if single else tuple(delta)
    if not single and not (set(names) == set(gradient) == set(mask)):
        raise ValueError(f"the sites differ: delta {names}, gradient {tuple(gradient)}, mask {tuple(mask)}")
    sites = [Site.of(delta, gradient, mask)] if single else [Site.of(delta[n], gradient[n], mask[n]) for n in names]
    if len({site.delta.shape[0] for site in sites}) > 1:
        raise ValueError(f"the sites have batches of different sizes: {[site.delta.shape[0] for site in sites]}")
    results = OPERATION.choose(impl, sites).run(sites, float(step_size), epsilon, norm == "linf") if sites else []
    return results[0] if single else dict(zip(names, results, strict=True))
