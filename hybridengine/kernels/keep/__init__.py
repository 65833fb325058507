"""The bits of many tensors, kept and brought back: what moving or swapping weights needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.keep import cpu, reference
from hybridengine.kernels.keep.kept import Kept

__all__ = ["Kept", "keep"]

OPERATION = Operation(
    "keep",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


def keep(tensors: Sequence[Tensor], *, impl: str | None = None) -> Kept:
    """Copy the bits of `tensors`; leaving the returned context, or its `restore`, writes them back.

        with kernels.keep(weights):
            torch._foreach_add_(weights, offsets)
            ...                                    # weights + offsets
        # the old bits, also after an exception

    Natively one parallel pass each way, into memory of the pool: no page is touched for the first time. No graph is
    recorded; autograd is told that the tensors changed.

    Args:
        tensors: any shapes, dtypes and devices; natively dense, contiguous and on the CPU. They may share memory.
        impl: "cpu" or "reference" instead of the automatic choice.

    Raises:
        KernelUnavailable: if `impl` cannot run these tensors.
    """
    plain = [tensor.detach() for tensor in tensors]
    result: Kept = OPERATION.choose(impl, plain).run(plain)
    return result
