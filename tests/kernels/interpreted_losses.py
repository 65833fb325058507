"""The losses by Triton from end to end, run with TRITON_INTERPRET=1: `interpreted_losses.py EXAMPLES`.

Operators, autograd and the chunks around the kernels are the real ones. Only the products of half-precision matrices,
which a CPU cannot sum in float32, are made another way.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import repair_loop_bounds
from loss_cases import Problem, assert_as_good_as_torch, problems, stated_loss
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels.linear_cross_entropy import blocked, gpu
from hybridengine.kernels.linear_cross_entropy.products import Narrow

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


def add(out: Tensor, a: Tensor, b: Tensor, *, first: bool, factor: float) -> None:
    """A product as a GPU writes it: in the factors' dtype, or in float32."""
    assert out.dtype in (a.dtype, torch.float32), f"a GPU writes no {out.dtype} product of {a.dtype}"
    made = a.float() @ b.float() * factor
    out.copy_(made if first else out + made)


def has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """As on a GPU."""
    seen.add(dtype)
    return dtype.itemsize == 2


seen: set[torch.dtype] = set()
HALVES = [torch.bfloat16, torch.float16]
EITHER = [*HALVES, torch.float32]


@quick
@given(
    dtypes=st.sampled_from([(x, w) for x in EITHER for w in EITHER]),
    autocast=st.sampled_from([None, None, *HALVES]),
    low_memory=st.booleans(),
    use_lse=st.booleans(),
    weighted=st.booleans(),
    options=st.fixed_dictionaries(
        {"reduction": st.sampled_from(["mean", "sum", "none"])},
        optional={"label_smoothing": st.just(0.1), "z_loss": st.just(0.01), "softcap": st.just(5.0)},
    ),
    seed=st.integers(0, 99),
)
def half_precision(
    dtypes: tuple[torch.dtype, torch.dtype],
    autocast: torch.dtype | None,
    low_memory: bool,
    use_lse: bool,
    weighted: bool,
    options: dict[str, Any],
    seed: int,
) -> None:
    """Gradients of the logits rounded for tensor cores; none overflows by the scale of a loss."""
    torch.manual_seed(seed)
    seen.clear()
    x, weight = torch.randn(20, 8).to(dtypes[0]), torch.randn(50, 8).to(dtypes[1])
    bias, target = torch.randn(50), torch.randint(0, 50, (20,))
    target[3] = -100
    class_weight = torch.rand(50) + 0.5 if weighted else None
    multiplied = autocast if autocast is not None and x.dtype == torch.float32 else x.dtype
    scale = 2.0**18 if multiplied == torch.float16 and options["reduction"] == "mean" else 1.0

    def total(loss: Tensor, lse: Tensor) -> Tensor:
        coming = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape) * scale
        total = (loss * coming).sum()
        return total + (lse * torch.linspace(-1, 1, 20, dtype=lse.dtype)).sum() if use_lse else total

    leaves = [one.clone().requires_grad_() for one in (x, weight, bias)]
    chosen: dict[str, Any] = {"mode": "low_memory"} if low_memory else {"chunk_rows": 6}
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        made = linear_by(
            *leaves[:2], target, bias=leaves[2], class_weight=class_weight, return_lse=use_lse, **options, **chosen
        )
    total(*(made if use_lse else (made, torch.zeros(20)))).backward()
    assert seen == {multiplied}, "forward and backward, which autograd runs without autocast"
    rounded = [one.to(multiplied) if multiplied.itemsize == 2 else one for one in (x, weight)]
    exact = [one.double().requires_grad_() for one in (*rounded, bias)]
    by_class = None if class_weight is None else class_weight.double()
    total(*stated_loss(exact[0] @ exact[1].t() + exact[2], target, weight=by_class, **options)).backward()
    for leaf, one in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and bool(leaf.grad.isfinite().all())
        # Each entry of the logits' gradient is rounded once, and so is the result; the interpreter truncates to
        # bfloat16: 2^-7 each.
        assert float((leaf.grad.double() - one.grad).norm() / one.grad.norm()) < 2**-6


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


def a_weight_that_is_no_number() -> None:
    """It spoils the rows of its class alone."""
    weight, target = torch.tensor([torch.nan, 1.0, 1.0]), torch.tensor([0, 1, 2, 2])
    loss = loss_by(torch.randn(4, 3), target, weight=weight, reduction="none")
    assert loss.isnan().tolist() == [True, False, False, False]


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
for check in (cross_entropy, linear_cross_entropy, a_bad_label, a_weight_that_is_no_number, compiled):
    check()
Narrow._add = staticmethod(add)  # type: ignore[method-assign]
gpu._has_tensor_cores = has_tensor_cores
half_precision()
print("all pass")
