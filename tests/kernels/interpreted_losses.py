"""The losses by Triton from end to end, run with TRITON_INTERPRET=1: `interpreted_losses.py EXAMPLES`.

Operators, autograd and the chunks around the kernels are the real ones. Only the products of half-precision matrices,
which a CPU cannot sum in float32, are made another way.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import repair_loop_bounds
from loss_cases import Problem, assert_as_good_as_torch, problems
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels.linear_cross_entropy import blocked, gpu
from hybridengine.kernels.linear_cross_entropy.products import Half

repair_loop_bounds()
blocked._FEWEST = 5  # so that a few classes need several blocks
examples = int(sys.argv[1])
quick = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
loss_by = partial(kernels.cross_entropy, impl="triton")
linear_by = partial(kernels.linear_cross_entropy, impl="triton")


@quick
@given(problem=problems(classes=[1, 2, 17, 77, 300], dtypes=[torch.float32]))
def cross_entropy(problem: Problem) -> None:
    """Loss, lse and gradient, by way of the lse and without it."""
    with_lse = problem.outcome(partial(loss_by, return_lse=True), torch.float32)
    assert_as_good_as_torch(problem, with_lse)
    if not problem.use_lse:
        loss, _, gradient = problem.outcome(lambda *a, **o: (loss_by(*a, **o), torch.zeros(1)), torch.float32)
        assert_as_good_as_torch(problem, (loss, with_lse[1], gradient))


@quick
@given(problem=problems(classes=[2, 17, 77], dtypes=[torch.float32]), split=st.integers(1, 12))
def linear_cross_entropy(problem: Problem, split: int) -> None:
    """With the identity as head, the gradient of x is that of the logits."""
    head = torch.eye(problem.logits.shape[1])
    options = dict(problem.options)
    class_weight = options.pop("weight", None)

    def run(x: Tensor, target: Tensor, **more: Any) -> Any:
        more.pop("weight", None)
        chosen: dict[str, Any] = {"mode": "low_memory"} if split > 9 else {"chunk_rows": split}
        return linear_by(x, head, target, class_weight=class_weight, return_lse=True, **chosen, **more)

    assert_as_good_as_torch(problem, problem.outcome(run, torch.float32))


def half_precision() -> None:
    """bfloat16 with rounded gradients of the logits, as on tensor cores, within their rounding of float64."""

    def add(out: Tensor, a: Tensor, b: Tensor, *, first: bool, factor: float) -> None:
        made = a.float() @ b.float() * factor
        out.copy_(made if first else out + made)

    Half._add = staticmethod(add)  # type: ignore[method-assign]
    gpu._products = lambda head, factor: Half(head.weight, torch.bfloat16, factor)
    x, weight = torch.randn(20, 8).bfloat16(), torch.randn(50, 8)
    target = torch.randint(0, 50, (20,))
    leaves = [one.clone().requires_grad_() for one in (x, weight)]
    linear_by(*leaves, target, chunk_rows=6).backward()
    exact = [x.double().requires_grad_(), weight.bfloat16().double().requires_grad_()]
    F.cross_entropy(exact[0] @ exact[1].t(), target).backward()
    for leaf, one in zip(leaves, exact, strict=True):
        # Each entry of the logits' gradient is rounded once (half of 2^-7), and so is the result.
        assert float((leaf.grad.double() - one.grad).norm() / one.grad.norm()) < 2**-7


def a_bad_label() -> None:
    """Named as on the CPU."""
    calls = [
        lambda target: loss_by(torch.randn(3, 5), target),
        lambda target: linear_by(torch.randn(3, 4), torch.randn(5, 4), target),
        lambda target: linear_by(torch.randn(3, 4), torch.randn(5, 4), target, mode="low_memory"),
    ]
    for call in calls:
        try:
            call(torch.tensor([-100, 7, 1]))
        except IndexError as error:
            assert "target[1] = 7 is not one of the 5 classes" in str(error)
        else:
            raise AssertionError("a label that is no class went through")


def compiled() -> None:
    """Traced whole, the automatic questions included."""
    target = torch.arange(8)

    def losses(x: Tensor, weight: Tensor) -> Tensor:
        consistency = kernels.kl_pair(x, x * 2, impl="triton")
        return loss_by(x @ weight.t(), target) + linear_by(x, weight, target, chunk_rows=3) + consistency

    leaves = [torch.randn(n, 6, requires_grad=True) for n in (8, 20)]
    results = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


torch.manual_seed(0)
for check in (cross_entropy, linear_cross_entropy, half_precision, a_bad_label, compiled):
    check()
print("all pass")
