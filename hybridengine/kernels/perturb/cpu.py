"""The perturbation step on the CPU by the native library: `csrc/perturb/`."""

from __future__ import annotations

from torch import Tensor

from hybridengine.kernels import native, operators
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.perturb.operator import run_cpu as run
from hybridengine.kernels.perturb.operator import why_not_these
from hybridengine.kernels.perturb.site import Site

__all__ = ["run", "why_missing", "why_not"]

why_missing = native.why_missing


def why_not(sites: list[Site]) -> str | None:
    """Say why these arguments cannot run here."""
    if any(one.device.type != "cpu" for site in sites for one in site):
        return "a tensor is not on the CPU"
    return why_not_these(sites, tuple(native.ELEMENT_TYPES))


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


operators.implement("perturb_step", "cpu", _operator)
