"""The Kullback-Leibler divergence of two predictions: one pass over both logits for the loss and its gradients."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from hybridengine.kernels.dispatch import Implementation, Operation
from hybridengine.kernels.kl_pair import cpu, reference, triton
from hybridengine.kernels.kl_pair.derivatives import DIRECTIONS, REDUCTIONS

__all__ = ["KLPairLoss", "kl_pair"]

OPERATION = Operation(
    "kl_pair",
    Implementation("triton", triton.run, triton.why_missing, triton.why_not, triton.why_slower),
    # No shape is too small for it: 8 rows of 2 classes take as long as in plain torch (benchmarks/bench_kernels.py).
    Implementation("cpu", cpu.run, cpu.why_missing, cpu.why_not),
    Implementation("reference", reference.run),
)


def kl_pair(
    a: Tensor,
    b: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Literal["none", "sum", "mean"] = "sum",
    direction: Literal["symmetric", "forward", "reverse"] = "symmetric",
    empty: Literal["nan", "zero"] = "nan",
    impl: str | None = None,
) -> Tensor:
    """Return the divergence of softmax(a / T) and softmax(b / T), as R-Drop, SMART and VAT add it to a loss.

    The formula stands in `reference.py`, with what holds for infinite logits; there is no factor T^2. The loss is
    float32 (float64 for float64 logits) also for half-precision logits; a gradient has its logits' dtype, and is
    computed only for an input that requires one. Equal logits give exactly zero; of nearly equal ones the kernels keep
    the relative precision of the loss and of the gradients, which plain torch loses to cancellation. Differentiable any
    number of times, under `torch.func` and under `torch.compile(fullgraph=True)`. Inputs are never changed. In forward
    mode (`jvp`, `jacfwd`, `hessian`) the automatic choice is the reference.

    Args:
        a, b: [N, V], any floating dtype and strides.
        temperature: T, divides both logits.
        mask: [N] bool, the rows that count; the others have no loss and no gradient whatever they hold, NaN included.
        reduction: "sum", "mean" (over the rows that count) or "none".
        direction: "forward" is KL(a || b), "reverse" KL(b || a), "symmetric" the mean of the two.
        empty: what the mean over no row is, as in `cross_entropy`; the gradient is zero in either case.
        impl: "triton", "cpu" or "reference" instead of the automatic choice.

    Raises:
        KernelUnavailable: if `impl` cannot run these arguments.
        ValueError: for a wrong shape, mask, temperature, `reduction`, `direction` or `empty`.
    """
    if has_torch_function((a, b)):  # logits that are not computed yet: they compute themselves and come again
        ourselves: Any = kl_pair
        options = {"temperature": temperature, "mask": mask, "reduction": reduction, "direction": direction}
        others: Tensor = handle_torch_function(ourselves, (a, b), a, b, **options, empty=empty, impl=impl)
        return others
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"expected two tensors [N, V], got {tuple(a.shape)} and {tuple(b.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != a.shape[:1]):
        raise ValueError(f"expected a mask of bool [{a.shape[0]}], got {mask.dtype} {tuple(mask.shape)}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'sum', 'mean' or 'none', not {reduction!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be 'symmetric', 'forward' or 'reverse', not {direction!r}")
    if empty != "nan" and empty != "zero":
        raise ValueError(f"empty must be 'nan' or 'zero', not {empty!r}")
    loss: Tensor = OPERATION.choose(impl, a, b, mask).run(a, b, mask, temperature, direction, reduction, empty)
    return loss


class KLPairLoss(torch.nn.Module):
    """`kl_pair` as a module, for two logits [N, V] and the mask [N] of the rows that count."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: Literal["none", "sum", "mean"] = "sum",
        direction: Literal["symmetric", "forward", "reverse"] = "symmetric",
        empty: Literal["nan", "zero"] = "nan",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction: Literal["none", "sum", "mean"] = reduction
        self.direction: Literal["symmetric", "forward", "reverse"] = direction
        self.empty: Literal["nan", "zero"] = empty

    def forward(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the divergence of `a` [N, V] and `b` [N, V]."""
        return kl_pair(
            a,
            b,
            temperature=self.temperature,
            mask=mask,
            reduction=self.reduction,
            direction=self.direction,
            empty=self.empty,
        )
