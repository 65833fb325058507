"""The cases and the float64 reference that every GPU implementation of cross-entropy is held to.

An implementation is a module with `forward` and `backward` (`cross_entropy/cuda.py`, `triton_kernel.py`).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS, IGNORED, IGNORE_INDEX = 4, 1, -7
# Below, at and across a warp; one pack and more a thread; 4097 is the first to go round Triton's block twice.
CLASSES = (1, 2, 31, 32, 33, 1000, 4096, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILLER = 77.0


@dataclass(frozen=True)
class Case:
    """One problem; layouts in elements: where rows start in their memory and how much lies between them."""

    dtype: torch.dtype
    classes: int
    target: str  # labels, smoothed, soft (of the logits' dtype), soft-float
    weighted: bool
    scale: float
    softcap: float
    z_loss: float
    start: int
    gap: int
    gradient: str  # in place, contiguous, displaced (another alignment than the logits'), none
    one_grad_loss: bool
    with_grad_lse: bool
    seed: int

    @property
    def smoothing(self) -> float:
        return 0.0 if self.target == "labels" else 0.1

    def __str__(self) -> str:
        options = [f"V{self.classes}", str(self.dtype)[6:], self.target, f"start{self.start}gap{self.gap}"]
        options += [f"scale{self.scale}cap{self.softcap}z{self.z_loss}", self.gradient.replace(" ", "-")]
        return "-".join(options + ["weighted"] * self.weighted)


def _case(number: int, dtype: torch.dtype, classes: int, target: str) -> Case:
    draw = random.Random(number)
    scale, softcap = draw.choice([(1.0, 0.0), (0.7, 0.0), (1.3, 5.0)])
    start, gap = draw.choice([(0, 0), (0, 0), (0, 16), (3, 0), (0, 5), (1, 16)])
    return Case(
        dtype,
        classes,
        target,
        weighted=draw.random() < 0.5,
        scale=scale,
        softcap=softcap,
        z_loss=draw.choice([0.0, 0.02]),
        start=start,
        gap=gap,
        gradient=draw.choice(["in place", "contiguous", "displaced", "none"]),
        one_grad_loss=draw.random() < 0.5,
        with_grad_lse=draw.random() < 0.5,
        seed=number,
    )


TARGETS = ("labels", "smoothed", "soft", "soft-float")
CASES = [_case(number, *case) for number, case in enumerate(itertools.product(DTYPES, CLASSES, TARGETS))]


@dataclass
class Problem:
    """The tensors of a case. `arguments` are the first ten of `forward` and `backward`."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    factors: Tensor
    arguments: tuple[Any, ...]


def laid_out(values: Tensor, start: int, gap: int) -> Tensor:
    """Return a copy of `values` [N, V] with this layout; what lies between the rows is FILLER."""
    rows, classes = values.shape
    stride = classes + gap
    memory = torch.full((start + rows * stride + 32,), FILLER, dtype=values.dtype)
    assert memory.data_ptr() % 16 == 0
    laid = memory[start:].as_strided((rows, classes), (stride, 1))
    laid.copy_(values)
    return laid


def filler_is_untouched(laid: Tensor) -> bool:
    """Whether nothing around the rows was written."""
    rows, classes = laid.shape
    memory = torch.empty(0, dtype=laid.dtype).set_(laid.untyped_storage())
    inside = torch.zeros_like(memory, dtype=torch.bool)
    inside.as_strided(laid.shape, laid.stride(), laid.storage_offset()).fill_(True)
    return bool((memory[~inside] == FILLER).all()) and int(inside.sum()) == rows * classes


def make_problem(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    values = (torch.randn(ROWS, case.classes, generator=generator) * 3).to(case.dtype)
    weight = torch.rand(case.classes, generator=generator) + 0.5 if case.weighted else None
    if case.target in ("labels", "smoothed"):
        target = torch.randint(case.classes, (ROWS,), generator=generator)
        target[IGNORED] = IGNORE_INDEX
        values[IGNORED, case.classes // 2] = float("nan")
    else:
        target = torch.softmax(torch.randn(ROWS, case.classes, generator=generator), -1)
        target = laid_out(target.to(case.dtype if case.target == "soft" else torch.float32), case.start, case.gap)
    logits = laid_out(values, case.start, case.gap)
    factors = torch.tensor([0.6, 1.7])
    weight_sum = float(case.classes) if weight is None else float(weight.double().sum())
    options = (IGNORE_INDEX, case.smoothing, case.scale, case.softcap, case.z_loss)
    return Problem(logits, target, weight, factors, (logits, target, weight, weight_sum, *options, factors))


@dataclass
class Exact:
    """What float64 says, with bounds of the error that float32 may make in each entry."""

    loss: Tensor
    lse: Tensor
    gradient: Tensor  # of the summed loss
    incoming: Tensor  # of sum(grad_loss * loss + grad_lse * lse)
    loss_bound: Tensor
    gradient_bound: Tensor


def exact(case: Case, problem: Problem, grad_loss: Tensor, grad_lse: Tensor) -> Exact:
    """Compute the contract in float64: y, q, then loss and lse; gradients by autograd."""
    counted = problem.target != IGNORE_INDEX if problem.target.dim() == 1 else torch.ones(ROWS, dtype=torch.bool)
    x = problem.logits.double().masked_fill(~counted[:, None], 0.0).requires_grad_()
    y = case.softcap * torch.tanh(case.scale * x / case.softcap) if case.softcap else case.scale * x
    w = torch.ones(case.classes).double() if problem.weight is None else problem.weight.double()
    if problem.target.dim() == 1:
        label = problem.target.masked_fill(~counted, 0)
        onehot = torch.nn.functional.one_hot(label, case.classes).double()
        q = (1 - case.smoothing) * w[label][:, None] * onehot + case.smoothing / case.classes * w
    else:
        q = w * ((1 - case.smoothing) * problem.target.double() + case.smoothing / case.classes)
    lse = torch.logsumexp(y, -1)
    s, sz = problem.factors.double()
    loss = (s * (q * (lse[:, None] - y)).sum(-1) + sz * case.z_loss * lse**2) * counted
    (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    total = (grad_loss.double() * loss + grad_lse.double() * lse * counted).sum()
    (incoming,) = torch.autograd.grad(total, x)

    # y carries 2 units in the last place (2^-23) of itself, exp and the sums some more of theirs; sums of some dozens
    # of terms a thread, and of 16 or more threads, lose about one unit for each doubling.
    with torch.no_grad():
        unit = 2.0**-23
        size = y.abs().amax(-1) + lse.abs() + case.softcap + 1
        mass = q.sum(-1)
        loss_bound = 8 * unit * (mass * size + sz * case.z_loss * size**2) * counted
        largest = torch.softmax(y, -1) * (mass + 2 * sz * case.z_loss * lse.abs() + 1)[:, None] + q
        gradient_bound = case.scale * 8 * unit * (size[:, None] + 8) * largest
    return Exact(loss.detach(), lse.detach() * counted, gradient, incoming, loss_bound, gradient_bound)


def rounding(gradient: Tensor, dtype: torch.dtype, units: float) -> Tensor:
    """Return what rounding to `dtype` may add: `units` of its unit in the last place."""
    info = torch.finfo(dtype)
    return units * (gradient.abs() * info.eps + info.smallest_normal * info.eps)


def gradient_memory(case: Case, logits: Tensor) -> Tensor | None:
    if case.gradient == "in place":
        return logits
    if case.gradient == "none":
        return None
    displaced = case.gradient == "displaced"
    return laid_out(torch.zeros_like(logits), case.start + displaced, case.gap + 2 * displaced)


def within(name: str, value: Tensor, expected: Tensor, bound: Tensor) -> None:
    error = (value.double() - expected).abs()
    assert bool((error <= bound).all()), f"{name}: error {error.max():.3g}, {(error / bound).max():.3g} of its bound"


def check(implementation: Any, case: Case, units: float) -> None:
    """Hold `forward` and `backward` to float64. `units`: of the gradient's rounding; 0.5 is to nearest.

    Raises:
        AssertionError: naming what is wrong.
    """
    problem = make_problem(case)
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad_loss = torch.rand((ROWS,), generator=generator) + 0.5
    if case.one_grad_loss:
        grad_loss = grad_loss[0].clone()
    grad_lse = torch.randn(ROWS, generator=generator) * 0.1 * case.with_grad_lse
    wanted = exact(case, problem, grad_loss, grad_lse)
    units *= 1.001  # the exact value is not on the grid either

    loss, lse = torch.full((ROWS,), FILLER), torch.full((ROWS,), FILLER)
    flag = torch.zeros(3, dtype=torch.int64)
    gradient = gradient_memory(case, problem.logits.clone() if case.gradient == "none" else problem.logits)
    untouched = problem.logits.clone()
    implementation.forward(*problem.arguments, loss, lse, gradient, flag)
    within("loss", loss, wanted.loss, wanted.loss_bound)
    within("lse", lse, wanted.lse, 8 * 2.0**-23 * (wanted.lse.abs() + case.softcap + 1))
    assert not flag.any()
    if gradient is not None:
        bound = wanted.gradient_bound + rounding(wanted.gradient, case.dtype, units)
        within("gradient", gradient, wanted.gradient, bound)
        assert filler_is_untouched(gradient), "the gradient was written outside of its rows"
    if case.gradient != "in place":
        assert torch.equal(problem.logits.nan_to_num(), untouched.nan_to_num()), "the logits were changed"

    problem = make_problem(case)
    gradient = gradient_memory(case, problem.logits)
    gradient = torch.empty_like(problem.logits.contiguous()) if gradient is None else gradient
    incoming = grad_lse if case.with_grad_lse else None
    implementation.backward(*problem.arguments, lse, grad_loss, incoming, gradient)
    bound = 2 * wanted.gradient_bound + rounding(wanted.incoming, case.dtype, units)
    within("incoming gradient", gradient, wanted.incoming, bound)
