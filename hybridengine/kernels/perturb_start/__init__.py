"""The random start of embedding attacks (PGD, FreeLB) from given draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.perturb.site import Norm, Per, check_choices, names_of
from hybridengine.kernels.perturb_start import cpu, reference
from hybridengine.kernels.perturb_start.draws import Draws

__all__ = ["perturb_start"]

# No Triton: on a GPU the draws, made on the host row by row, take far longer than torch's few passes over them.
OPERATION = Operation(
    "perturb_start",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


@overload
def perturb_start(
    uniform: Tensor,
    mask: Tensor,
    *,
    epsilon: float,
    norm: Norm = "l2",
    per: Per = "sequence",
    impl: str | None = None,
) -> Tensor: ...


@overload
def perturb_start(
    uniform: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
    *,
    epsilon: float,
    norm: Norm = "l2",
    per: Per = "sequence",
    impl: str | None = None,
) -> dict[str, Tensor]: ...


def perturb_start(
    uniform: Any,
    mask: Any,
    *,
    epsilon: float,
    norm: Norm = "l2",
    per: Per = "sequence",
    impl: str | None = None,
) -> Tensor | dict[str, Tensor]:
    """Return the perturbation that `uniform` draws stand for: uniform in a cube within the ball of radius epsilon.

    The formula stands in `reference.py`. Masked positions of the result are exactly 0, whatever was drawn there.
    Nothing is drawn here: the caller keys its randomness. Nothing is read back to the host, no graph is recorded.

    Args:
        uniform: draws in [0, 1), [B, L, D], or {site: [B, L_site, D_site]}, in the dtype of the result; float32,
            bfloat16 or float64 natively.
        mask: [B, L] for each site, bool or 0/1: the positions that may be perturbed.
        epsilon: the most that the L2 norm of a sequence over all sites (of a token), or any coordinate for "linf", is.
        norm: "l2" or "linf".
        per: "sequence" or "token": whose norm.
        impl: "cpu" or "reference" instead of the automatic choice.

    Returns:
        A new tensor, or {site: tensor}, in the dtype of `uniform`.

    Raises:
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for shapes or sites that do not match, an unknown `norm` or `per`, a negative or NaN size.
    """
    check_choices(norm, per)
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    if isinstance(uniform, Tensor):
        return _start([Draws.of(uniform, mask)], epsilon, norm, per, impl)[0]
    names = names_of(uniform=uniform, mask=mask)
    sites = [Draws.of(uniform[n], mask[n]) for n in names]
    if len({site.uniform.shape[0] for site in sites}) > 1:
        raise ValueError(f"the sites have batches of different sizes: {[site.uniform.shape[0] for site in sites]}")
    return dict(zip(names, _start(sites, epsilon, norm, per, impl), strict=True)) if sites else {}


def _start(sites: list[Draws], epsilon: float, norm: Norm, per: Per, impl: str | None) -> list[Tensor]:
    options = (float(epsilon), norm == "linf")
    if per == "sequence":
        result: list[Tensor] = OPERATION.choose(impl, sites).run(sites, *options)
        return result
    tokens = [[site.by_token()] for site in sites]
    made = [OPERATION.choose(impl, one).run(one, *options)[0] for one in tokens]
    return [one.view(site.uniform.shape) for one, site in zip(made, sites, strict=True)]
