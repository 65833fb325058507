"""Cross-entropy on a GPU: the operators on top of the kernels of `cuda` and `triton_kernel`, which are alike."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridengine.kernels import operators, triton_runtime
from hybridengine.kernels.cross_entropy.autograd import run_operator
from hybridengine.kernels.cross_entropy.label_flags import flag_of
from hybridengine.kernels.cross_entropy.layout import ROW_DTYPES
from hybridengine.kernels.cross_entropy.options import REDUCTIONS, Options, factors, is_soft
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.modes import forward_mode

__all__ = [
    "RowProblem",
    "row_factors",
    "run_cuda",
    "run_triton",
    "times_rows",
    "why_not_cuda",
    "why_not_triton",
    "why_slower",
]

Launch = Callable[..., None]
_PACKAGE = "hybridengine.kernels.cross_entropy"
_LAUNCHES: dict[str, tuple[Launch, Launch]] = {
    "cuda": (operators.later(f"{_PACKAGE}.cuda", "forward"), operators.later(f"{_PACKAGE}.cuda", "backward")),
    "triton": (
        operators.later(f"{_PACKAGE}.triton_kernel", "forward"),
        operators.later(f"{_PACKAGE}.triton_kernel", "backward"),
    ),
}
_label_totals = operators.later(f"{_PACKAGE}.triton_totals", "label_totals")
# On an H100 a call costs the host half a millisecond, in which plain torch does 8 (bfloat16) to 30 million (float32)
# logits.
_FEWEST_ELEMENTS = 1 << 24

run_cuda = partial(run_operator, "cuda")
run_triton = partial(run_operator, "triton")


def why_slower(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> str | None:
    """Say why plain torch is taken for this shape."""
    if logits.numel() < _FEWEST_ELEMENTS:
        return f"fewer than {_FEWEST_ELEMENTS} logits: plain torch"
    return triton_runtime.why_slower()


def why_not_triton(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> str | None:
    """Say why Triton cannot run these arguments."""
    return triton_runtime.why_not_on(logits, target, weight) or _why_not(logits, target, weight)


def why_not_cuda(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> str | None:
    """Say why the CUDA library cannot run these arguments."""
    if any(one is not None and one.device.type != "cuda" for one in (logits, target, weight)):
        return "a tensor is not on a GPU"
    return _why_not(logits, target, weight)


def _why_not(logits: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    if logits.dtype not in ROW_DTYPES:
        return f"the logits are {logits.dtype}; it takes float32, bfloat16 and float16"
    if target.requires_grad or (weight is not None and weight.requires_grad):
        return "a gradient of the targets or of the class weights is wanted"
    if logits.shape[1] == 0:
        return "there are no classes"
    if forward_mode():
        return "forward-mode differentiation is on (torch.func.jvp, jacfwd, hessian); only plain torch has it"
    return None


class RowProblem:
    """Rows of logits and all that their kernels are told, for one implementation."""

    def __init__(
        self,
        impl: str,
        target: Tensor,
        weight: Tensor | None,
        classes: int,
        options: Options,
        by: Tensor,
        checked: bool = False,
    ) -> None:
        """Prepare targets and weights.

        Args:
            by: float32 [2], or [N, 2] for each row its own, on the device: factors of the loss and of the z term.
            checked: whether every label is known to be a class or ignored.
        """
        self.forward, self.backward = _LAUNCHES[impl]
        self.target = _as_read(target)
        self.weight = None if weight is None else weight.float().contiguous()
        self.options, self.by, self.checked = options, by, checked
        # The one number that the host must know: only smoothing together with class weights makes it wait.
        needs_sum = self.weight is not None and options.label_smoothing != 0.0
        self.weight_sum = float(self.weight.sum()) if needs_sum and self.weight is not None else float(classes)

    def of_rows(self, target: Tensor, by: Tensor) -> RowProblem:
        """The same problem for other rows: their targets and factors."""
        other = copy(self)
        other.target = _as_read(target)
        other.by = by
        return other

    @property
    def shared(self) -> tuple[Any, ...]:
        """What both passes take between the target and their own arguments."""
        o = self.options
        return self.weight, self.weight_sum, o.ignore_index, o.label_smoothing, o.scale, o.softcap, o.z_loss, self.by

    def run(self, logits: Tensor, loss: Tensor, lse: Tensor, gradient: Tensor | None) -> None:
        """Fill `loss`, `lse` [N] and the gradient of that loss."""
        if self.checked or is_soft(self.target):
            self.forward(logits, self.target, *self.shared, loss, lse, gradient, None)
            return
        flag = flag_of(logits.device)
        self.forward(logits, self.target, *self.shared, loss, lse, gradient, flag.tensor())
        flag.launched(self.options.ignore_index)

    def run_backward(
        self, logits: Tensor, lse: Tensor, by_loss: Tensor, by_lse: Tensor | None, gradient: Tensor
    ) -> None:
        """Fill `gradient` for what comes in; `lse` is read."""
        coming = None if by_lse is None else by_lse.float().contiguous()
        self.backward(logits, self.target, *self.shared, lse, by_loss.float(), coming, gradient)


def _as_read(target: Tensor) -> Tensor:
    return target.float().contiguous() if is_soft(target) else target.contiguous()


def times_rows(by: Tensor, coming: Tensor) -> Tensor:
    """Return factors [2] or [N, 2] of the rows, with what comes in for their losses (a scalar or [N]) in them."""
    return by * (coming.float().unsqueeze(-1) if coming.dim() else coming.float())


def row_factors(
    target: Tensor, weight: Tensor | None, classes: int, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the factors of a row's loss and z term, float32 [2], what a loss over nothing adds to 0, and `totals`.

    The last is what `triton_totals.label_totals` counted, or None where plain torch did.
    """
    mean = options.reduction == REDUCTIONS["mean"]
    if is_soft(target) or not target.numel() or triton_runtime.why_missing() is not None:
        by_loss, by_z, nothing = factors(target.new_empty(0, dtype=torch.float32), target, weight, options)
        return torch.stack((by_loss, by_z)), nothing, None
    weight = None if weight is None else weight.float().contiguous()
    found, totals = _label_totals(target, weight, classes, options.ignore_index, mean, options.empty_is_zero)
    return found[:2], found[2], totals


def _problem(
    impl: str, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[RowProblem, Tensor]:
    """Return the problem, and what a loss over nothing adds to 0."""
    by, nothing, _ = row_factors(target, weight, logits.shape[1], options)
    return RowProblem(impl, target, weight, logits.shape[1], options, by), nothing


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] <= 1 else logits.contiguous()


def _run(
    impl: str, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    record("cross_entropy", impl)
    problem, nothing = _problem(impl, logits, target, weight, options)
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    problem.run(_rows(logits), loss, lse, gradient)
    if options.reduction == REDUCTIONS["none"]:
        return loss, lse
    total = loss.sum()
    return total + nothing if options.reduction == REDUCTIONS["mean"] else total, lse


def _forward(impl: str, logits: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if rest[-1] else logits.new_empty(0)
    loss, lse = _run(impl, logits, target, weight, Options(*rest[:-1]), gradient if rest[-1] else None)
    return loss, lse, gradient


def _forward_in_place(
    impl: str, logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    return _run(impl, logits, target, weight, Options(*options), logits)


def _backward(
    impl: str,
    by_loss: Tensor | None,
    by_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *options: Any,
) -> Tensor:
    record("cross_entropy", impl)
    problem, _ = _problem(impl, logits, target, weight, Options(*options))
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if by_loss is not None and by_lse is None:
        # Not by way of the lse: from its rounded value, p - 1 of a confident label would keep two digits.
        problem.by = times_rows(problem.by, by_loss)
        problem.run(_rows(logits), torch.empty_like(lse), lse, gradient)
        return gradient
    problem.run(_rows(logits), torch.empty_like(lse), lse, None)
    coming = torch.zeros((), device=logits.device) if by_loss is None else by_loss
    problem.run_backward(_rows(logits), lse, coming, by_lse, gradient)
    return gradient


for _impl in _LAUNCHES:
    operators.implement("cross_entropy", _impl, partial(_forward, _impl))
    operators.implement("cross_entropy_", _impl, partial(_forward_in_place, _impl))
    operators.implement("cross_entropy_backward", _impl, partial(_backward, _impl))
