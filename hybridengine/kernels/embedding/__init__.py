"""Embedding lookup whose gradient is zeroed past the cache and summed without locks."""

from __future__ import annotations

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.embedding import cpu, reference

__all__ = ["embedding"]

OPERATION = Operation(
    "embedding",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


def embedding(weight: Tensor, ids: Tensor, *, padding_idx: int | None = None, impl: str | None = None) -> Tensor:
    """Return `weight[ids]`, with a dense gradient; that of `torch.nn.functional.embedding`, to the bit.

    Args:
        weight: [V, D], floating.
        ids: any shape, int64, each in [0, V).
        padding_idx: a row that gets no gradient; negative counts from the end.
        impl: "cpu" or "reference" instead of the automatic choice.

    Raises:
        IndexError: an id is outside the table.
        KernelUnavailable: if `impl` cannot run these arguments.
    """
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    result: Tensor = OPERATION.choose(impl, weight, ids, padding).run(weight, ids, padding)
    return result
