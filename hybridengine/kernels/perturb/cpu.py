"""The perturbation step on the CPU by the native library: `csrc/perturb/`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.perturb.site import Site

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(sites: list[Site]) -> str | None:
    """Say why these arguments cannot run here."""
    if not sites:
        return "there is no site"
    dtype = sites[0].delta.dtype
    for site in sites:
        if any(one.device.type != "cpu" for one in site):
            return "a tensor is not on the CPU"
        if site.delta.dtype != dtype or site.gradient.dtype != dtype or dtype not in native.ELEMENT_TYPES:
            return f"it takes one of float32, bfloat16, float64 for all tensors, got {site.delta.dtype}"
        if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_functorch_wrapped_tensor, site)):
            return "it has no rule for torch.func transforms"
    return None


def run(sites: list[Site], step_size: float, epsilon: float | None, linf: bool) -> list[Tensor]:
    """Return the new delta of each site."""
    delta, gradient, mask = ([getattr(site, name) for site in sites] for name in Site._fields)
    results: list[Tensor] = torch.ops.hybridengine.perturb_step(delta, gradient, mask, step_size, epsilon, linf, "cpu")
    return results


def _fake(delta: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in delta]


def _operator(
    delta: list[Tensor], gradient: list[Tensor], mask: list[Tensor], step_size: float, epsilon: float | None, linf: bool
) -> list[Tensor]:
    """The operator's kernel: checked tensors in, addresses to the library."""
    record("perturb", "cpu")
    # The lists hold the contiguous copies alive until the library has read them.
    inputs = [[one.contiguous() for one in tensors] for tensors in (delta, gradient, mask)]
    results = [native.empty(tuple(one.shape), one.dtype) for one in delta]
    addresses = [
        (d.data_ptr(), g.data_ptr(), m.data_ptr(), out.data_ptr(), d.shape[1], d.shape[2])
        for d, g, m, out in zip(*inputs, results, strict=True)
    ]
    element = native.ELEMENT_TYPES[delta[0].dtype]
    native.module().perturb_step(element, delta[0].shape[0], addresses, step_size, epsilon, linf)
    return results


operators.define(
    "perturb_step(Tensor[] delta, Tensor[] gradient, Tensor[] mask, float step_size, float? epsilon, bool linf, "
    "str impl) -> Tensor[]",
    _fake,
)
operators.implement("perturb_step", "cpu", _operator)
