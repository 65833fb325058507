"""GELU with the error function, value and gradient each in one pass that takes a single exponential."""

from __future__ import annotations

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.gelu import cpu, reference

__all__ = ["gelu"]

OPERATION = Operation(
    "gelu",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not, cpu.why_slower),
    Implementation("reference", reference.run),
)


def gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Return x Phi(x), Phi being the distribution function of the standard normal. Differentiable any number of times.

    The native kernel is within 2 eps |x| of the exact value, and its gradient within 3 eps of the incoming one.
    Infinity gives infinity, minus infinity and NaN give NaN, and all three the gradient NaN. The bits do not depend on
    the number of threads.

    Args:
        x: any shape, floating; natively float32 and contiguous.
        impl: "cpu" or "reference" instead of the automatic choice.

    Raises:
        KernelUnavailable: if `impl` cannot run this tensor.
    """
    result: Tensor = OPERATION.choose(impl, x).run(x)
    return result
