"""The move of many weights along their gradient, and back to the bit: SAM, ASAM, GSAM, AWP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.perturb_weights import cpu, reference
from hybridengine.kernels.perturb_weights.moved import MovedWeights

__all__ = ["MovedWeights", "Rule", "perturb_weights"]

Rule = Literal["sam", "asam", "awp"]

# No Triton: on a GPU torch's `foreach` passes are fused over tensors already. Passes of our own would save about 4 of
# their 12 reads and writes of a weight, 0.1 ms for 22 M weights at 3 TB/s, beside two forwards and backwards.
OPERATION = Operation(
    "perturb_weights",
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


def perturb_weights(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    rho: float,
    rule: Rule = "sam",
    eta: float = 0.01,
    impl: str | None = None,
) -> MovedWeights:
    """Move `weights` in place to the worst place nearby, in first order; the result brings their old bits back.

        with kernels.perturb_weights(weights, gradients, rho=0.05) as moved:
            ...                                    # at w + e; moved.norm, moved.distance()
        # the old bits, also after an exception

    The weights have moved when the call returns. The formulas stand in `reference.py`: "sam" (GSAM moves alike),
    "asam", and "awp", which measures each tensor by itself. A gradient whose norm is zero or not finite has no
    direction: nothing is moved by it (`moved.usable` tells). Gradients are only read and may be freed at once.
    Natively two parallel passes: the second saves the old bits, and no offsets are stored. No graph is recorded;
    autograd is told of the change.

    Args:
        weights: floating tensors of any shapes that share no memory; natively contiguous on the CPU, float32, float64
            or bfloat16.
        gradients: as many, of the same shapes; natively in the weight's dtype, or float32 beside bfloat16.
        rho: the radius: norm of the move (SAM), relative to the weights' sizes (ASAM), to each tensor's norm (AWP).
        rule: "sam", "asam" or "awp".
        eta: what ASAM adds to each weight's size.
        impl: "cpu" or "reference" instead of the automatic choice. The reference reads the norms back to the host.

    Raises:
        KernelUnavailable: if `impl` cannot run these tensors.
        ValueError: for shapes that differ, an unknown rule, a negative or NaN number.
    """
    if rule not in ("sam", "asam", "awp"):
        raise ValueError(f"rule must be 'sam', 'asam' or 'awp', not {rule!r}")
    if not rho >= 0 or not eta >= 0:
        raise ValueError(f"rho and eta must not be negative, got {rho} and {eta}")
    shapes, others = [tuple(w.shape) for w in weights], [tuple(g.shape) for g in gradients]
    if shapes != others:
        at = next((i for i, (a, b) in enumerate(zip(shapes, others, strict=False)) if a != b), None)
        what = f"{len(shapes)} and {len(others)}" if at is None else f"{shapes[at]} and {others[at]} at {at}"
        raise ValueError(f"weights and gradients must have the same shapes, got {what}")
    plain = [w.detach() for w in weights], [g.detach() for g in gradients]
    result: MovedWeights = OPERATION.choose(impl, *plain).run(*plain, rule, float(rho), float(eta))
    return result
