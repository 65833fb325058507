"""The exponential moving average of many weights in one parallel pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.ema import cpu, reference

__all__ = ["ema_update"]

OPERATION = Operation(
    "ema",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


def ema_update(averages: Sequence[Tensor], weights: Sequence[Tensor], *, rate: float, impl: str | None = None) -> None:
    """Move `averages` in place towards `weights`: average += rate (weight - average).

    The formula stands in `reference.py`. No graph is recorded; autograd is told that the averages changed.

    Args:
        averages: floating tensors of any shapes that share no memory; natively contiguous on the CPU, float32 or
            float64.
        weights: as many, of the same shapes; natively of the average's dtype, or bfloat16 beside float32.
        rate: from 0 (nothing moves) to 1 (the average becomes the weight); one minus the decay.
        impl: "cpu" or "reference" instead of the automatic choice.

    Raises:
        KernelUnavailable: if `impl` cannot run these tensors.
        ValueError: for shapes that differ, or a rate outside 0 to 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be from 0 to 1, got {rate}")
    if [a.shape for a in averages] != [w.shape for w in weights]:
        raise ValueError("averages and weights must be as many, and of the same shapes")
    plain = [a.detach() for a in averages], [w.detach() for w in weights]
    OPERATION.choose(impl, *plain).run(*plain, float(rate))
