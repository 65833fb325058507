"""Dropout whose mask is drawn from a counter, in parallel, and drawn again in the backward pass instead of stored."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.dropout import cpu, reference

__all__ = ["dropout"]

OPERATION = Operation(
    "dropout",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


def dropout(x: Tensor, p: float = 0.5, *, seed: int | None = None, impl: str | None = None) -> Tensor:
    """Return `x` with each element zeroed with probability `p`, to 2^-17, and the rest scaled to keep the expectation.

    Which elements depends on `seed` and their positions alone. Differentiable any number of times. A dropped element
    is zero even if it was NaN. The formula stands in `reference.py`; both implementations drop the same elements.

    Args:
        x: any shape, floating.
        p: in [0, 1].
        seed: below 2^63; by default drawn from torch's global generator, so `torch.manual_seed` decides.
        impl: "cpu" or "reference" instead of the automatic choice.

    Raises:
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for `p` outside [0, 1] or a negative seed.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability, got {p}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2^63), got {seed}")
    if p == 0:
        return x.clone()
    if p == 1:
        return x * 0
    drawn = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    result: Tensor = OPERATION.choose(impl, x, p, drawn).run(x, p, drawn)
    return result
