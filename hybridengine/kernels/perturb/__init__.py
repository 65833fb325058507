"""The masked step of embedding attacks (FGM, PGD, FreeLB and kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.perturb import cpu, gpu, reference
from hybridengine.kernels.perturb.site import Norm, Per, Site, check_choices, names_of

__all__ = ["perturb_step"]

OPERATION = Operation(
    "perturb",
    Implementation("triton", gpu.run, gpu.why_missing, gpu.why_not, gpu.why_slower),
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
    norm: Norm = "l2",
    per: Per = "sequence",
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
    norm: Norm = "l2",
    per: Per = "sequence",
    impl: str | None = None,
) -> dict[str, Tensor]: ...


def perturb_step(
    delta: Any,
    gradient: Any,
    mask: Any,
    *,
    step_size: float,
    epsilon: float | None = None,
    norm: Norm = "l2",
    per: Per = "sequence",
    impl: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Return the perturbation after one ascent step.

    The formula stands in `reference.py`. Norms, step and projection are those of each sequence, joint over all sites,
    or of each token of each site by itself. Masked positions of the result are exactly 0. A sequence (token) whose
    gradient is zero takes no step; one whose gradient holds NaN or infinity keeps its delta, unprojected. Nothing is
    read back to the host and no graph is recorded. A sequence's result does not depend on the other sequences or on
    padding.

    Args:
        delta: [B, L, D], or {site: [B, L_site, D_site]}; float32, bfloat16 or float64 natively on the CPU, float32,
            bfloat16 or float16 on a GPU, anything floating by the reference.
        gradient: of the loss by `delta`, same structure, shapes and dtype. Its scale does not matter.
        mask: [B, L] for each site, bool or 0/1: the positions that may be perturbed.
        step_size: the L2 norm of each step, or its size in every coordinate for "linf".
        epsilon: the radius of the ball (L2) or box (Linf) around 0; None does not project.
        norm: "l2" or "linf".
        per: "sequence" or "token": whose norms.
        impl: "triton", "cpu" or "reference" instead of the automatic choice.

    Returns:
        A new tensor, or {site: tensor}, in delta's dtype. ||delta|| <= epsilon holds up to its rounding to that dtype.

    Raises:
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for shapes or sites that do not match, an unknown `norm` or `per`, a negative or NaN size.
    """
    check_choices(norm, per)
    if not step_size >= 0 or not (epsilon is None or epsilon >= 0):
        raise ValueError(f"step_size and epsilon must not be negative, got {step_size} and {epsilon}")
    if isinstance(delta, Tensor):
        return _step([Site.of(delta, gradient, mask)], step_size, epsilon, norm, per, impl)[0]
    names = names_of(delta=delta, gradient=gradient, mask=mask)
    sites = [Site.of(delta[n], gradient[n], mask[n]) for n in names]
    if len({site.delta.shape[0] for site in sites}) > 1:
        raise ValueError(f"the sites have batches of different sizes: {[site.delta.shape[0] for site in sites]}")
    return dict(zip(names, _step(sites, step_size, epsilon, norm, per, impl), strict=True)) if sites else {}


def _step(
    sites: list[Site], step_size: float, epsilon: float | None, norm: Norm, per: Per, impl: str | None
) -> list[Tensor]:
    options = (float(step_size), epsilon, norm == "linf")
    if per == "sequence":
        result: list[Tensor] = OPERATION.choose(impl, sites).run(sites, *options)
        return result
    tokens = [[site.by_token()] for site in sites]
    moved = [OPERATION.choose(impl, one).run(one, *options)[0] for one in tokens]
    return [one.view(site.delta.shape) for one, site in zip(moved, sites, strict=True)]
