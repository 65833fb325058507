"""The random start on the CPU by the native library: `csrc/perturb/`."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.perturb_start.draws import Draws

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(sites: list[Draws]) -> str | None:
    """Say why these arguments cannot run here."""
    if not sites:
        return "there is no site"
    dtype = sites[0].uniform.dtype
    for site in sites:
        if any(one.device.type != "cpu" for one in site):
            return "a tensor is not on the CPU"
        if site.uniform.dtype != dtype or dtype not in native.ELEMENT_TYPES:
            return f"it takes one of float32, bfloat16, float64 for all tensors, got {site.uniform.dtype}"
        if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_functorch_wrapped_tensor, site)):
            return "it has no rule for torch.func transforms"
    return None


def run(sites: list[Draws], epsilon: float, linf: bool) -> list[Tensor]:
    """Return the delta of each site."""
    uniform, mask = [site.uniform for site in sites], [site.mask for site in sites]
    results: list[Tensor] = torch.ops.hybridengine.perturb_start(uniform, mask, epsilon, linf, "cpu")
    return results


def _fake(uniform: list[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in uniform]


def _operator(uniform: list[Tensor], mask: list[Tensor], epsilon: float, linf: bool) -> list[Tensor]:
    """The operator's kernel: checked tensors in, addresses to the library."""
    record("perturb_start", "cpu")
    # The lists hold the contiguous copies alive until the library has read them.
    inputs = [[one.contiguous() for one in tensors] for tensors in (uniform, mask)]
    results = [native.empty(tuple(one.shape), one.dtype) for one in uniform]
    addresses = [
        (u.data_ptr(), m.data_ptr(), out.data_ptr(), u.shape[1], u.shape[2])
        for u, m, out in zip(*inputs, results, strict=True)
    ]
    element = native.ELEMENT_TYPES[uniform[0].dtype]
    native.module().perturb_start(element, uniform[0].shape[0], addresses, epsilon, linf)
    return results


operators.define(
    "perturb_start(Tensor[] uniform, Tensor[] mask, float epsilon, bool linf, str impl) -> Tensor[]", _fake
)
operators.implement("perturb_start", "cpu", _operator)
