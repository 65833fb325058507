"""The L2 norm of many tensors at once, for clipping: one parallel pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.norm import cpu, reference

__all__ = ["total_norm"]

OPERATION = Operation(
    "total_norm",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor], *, impl: str | None = None) -> Tensor:
    """Return the L2 norm of all `tensors` together, a float64 scalar; 0 for none.

    The native sum has an order of its own, whatever the number of threads: the same tensors give the same bits.
    NaN and infinity are passed on. Not differentiable.

    Args:
        impl: "cpu" or "reference" instead of the automatic choice.

    Raises:
        KernelUnavailable: if `impl` cannot run these tensors.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    result: Tensor = OPERATION.choose(impl, tensors).run(tensors)
    return result
