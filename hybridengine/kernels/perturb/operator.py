"""The torch operator of the perturbation step; `cpu.py` and `triton_kernel.py` run it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hybridengine.kernels import operators
from hybridengine.kernels.perturb.site import Site

__all__ = ["run_cpu", "run_triton", "why_not_these"]


def why_not_these(sites: list[Site], dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Say why no operator can run these sites: it takes plain tensors, all of one of `dtypes`."""
    if not sites:
        return "there is no site"
    dtype = sites[0].delta.dtype
    for site in sites:
        if site.delta.dtype != dtype or site.gradient.dtype != dtype or dtype not in dtypes:
            names = ", ".join(str(one).removeprefix("torch.") for one in dtypes)
            return f"it takes one of {names} for all tensors, got {site.delta.dtype} and {site.gradient.dtype}"
        if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_functorch_wrapped_tensor, site)):
            return "it has no rule for torch.func transforms"
    return None


def _run(impl: str, sites: list[Site], step_size: float, epsilon: float | None, linf: bool) -> list[Tensor]:
    """Return the new delta of each site."""
    delta, gradient, mask = ([getattr(site, name) for site in sites] for name in Site._fields)
    results: list[Tensor] = torch.ops.hybridengine.perturb_step(delta, gradient, mask, step_size, epsilon, linf, impl)
    return results


run_cpu = partial(_run, "cpu")
run_triton = partial(_run, "triton")


def _fake(delta: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in delta]


operators.define(
    "perturb_step(Tensor[] delta, Tensor[] gradient, Tensor[] mask, float step_size, float? epsilon, bool linf, "
    "str impl) -> Tensor[]",
    _fake,
)
