"""The operations of `hybridengine.kernels` on a GPU as callers see them: numbers, derivatives, memory, no waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import kl_pair_cases
import perturb_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_cases import Problem, assert_as_good_as_torch, problems
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import cuda_library, triton_runtime
from hybridengine.kernels.scaling import scale_rows

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16


@pytest.fixture(params=["cuda", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if reason := (cuda_library if request.param == "cuda" else triton_runtime).why_missing():
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def triton() -> str:
    if reason := triton_runtime.why_missing():
        pytest.skip(reason)
    return "triton"


def few(examples: int) -> settings:
    """Few examples: Triton compiles a kernel for every combination of options."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet)


def there(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of CPU tensors, computed on the GPU; gradients travel back as well."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*map(there, arguments), **{name: there(one) for name, one in options.items()})
        return tuple(one.cpu() for one in result) if isinstance(result, tuple) else result.cpu()

    return call


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@few(60)
@given(problem=problems(classes=[2, 300, 5000], dtypes=[torch.float32, HALF]))
def test_cross_entropy_is_as_good_as_torch(impl: str, problem: Problem) -> None:
    loss = on_gpu(partial(kernels.cross_entropy, return_lse=True, impl=impl))
    assert_as_good_as_torch(problem, problem.outcome(loss, problem.logits.dtype))


@few(40)
@given(problem=problems(classes=[17, 300], dtypes=[torch.float32]), split=st.sampled_from([1, 4, 9, "low_memory"]))
def test_linear_cross_entropy_is_as_good_as_torch(impl: str, problem: Problem, split: Any) -> None:
    """With the identity as head, the gradient of x is that of the logits."""
    head = torch.eye(problem.logits.shape[1])
    chosen = {"mode": split} if split == "low_memory" else {"chunk_rows": split}

    def run(x: Tensor, target: Tensor, **options: Any) -> Any:
        class_weight = options.pop("weight", None)
        by_gpu = on_gpu(partial(kernels.linear_cross_entropy, return_lse=True, impl=impl, **chosen))
        return by_gpu(x, head, target, class_weight=class_weight, **options)

    assert_as_good_as_torch(problem, problem.outcome(run, torch.float32))


@few(60)
@given(case=kl_pair_cases.cases(kl_pair_cases.GPU))
def test_kl_pair_is_as_good_as_torch(triton: str, case: kl_pair_cases.Case) -> None:
    kl_pair_cases.assert_close_to_float64(case, triton, on_gpu(kernels.kl_pair))


@few(150)
@given(case=perturb_cases.cases([torch.float32, HALF, torch.float16], [1, 19, 300, 1100]))
def test_a_perturbation_is_the_exact_step(triton: str, case: perturb_cases.Case) -> None:
    perturb_cases.check(case, triton, device="cuda")


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact).norm() / exact.norm())


class Head:
    """A head of a language model in bfloat16, its exact gradients, and those that only rounding keeps from exact.

    1/rows is far from a number that bfloat16 has, so that a gradient rounded with that factor would show.
    """

    def __init__(self, rows: int = 1023, hidden: int = 256, classes: int = 20000) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        draw = partial(torch.randn, device="cuda", generator=generator)
        self.x, self.weight = draw(rows, hidden).to(HALF), (draw(classes, hidden) / hidden**0.5).to(HALF)
        self.target = torch.randint(0, classes, (rows,), device="cuda", generator=generator)
        x, weight = (one.double().requires_grad_() for one in (self.x, self.weight))
        logits = x @ weight.t()
        self.loss = F.cross_entropy(logits, self.target)
        (by_logits,) = torch.autograd.grad(self.loss, logits, retain_graph=True)
        self.gradients = torch.autograd.grad(self.loss, (x, weight))
        by_logits = (by_logits * rows).to(HALF).double() / rows  # tensor cores take it in half precision
        rounded = ((by_logits @ weight).to(HALF), (by_logits.t() @ x).to(HALF))
        self.floor = [relative(one, exact) for one, exact in zip(rounded, self.gradients, strict=True)]

    def errors(self, **options: Any) -> tuple[float, list[float]]:
        leaves = [one.clone().requires_grad_() for one in (self.x, self.weight)]
        loss = kernels.linear_cross_entropy(*leaves, self.target, **options)
        loss.backward()
        found = [relative(leaf.grad, exact) for leaf, exact in zip(leaves, self.gradients, strict=True)]
        return relative(loss, self.loss.detach()), found


@pytest.mark.parametrize("rows", [64, 250, 2000, None])
def test_half_precision_loses_only_its_rounding_whatever_the_chunk(impl: str, rows: int) -> None:
    head = Head()
    loss, errors = head.errors(impl=impl, chunk_rows=rows)
    assert loss < 1e-5  # float32: products of 256 terms and a sum of 20,000 exponentials
    for error, floor in zip(errors, head.floor, strict=True):
        assert error <= 1.05 * floor


def test_low_memory_loses_only_its_rounding(impl: str) -> None:
    head = Head()
    loss, errors = head.errors(impl=impl, mode="low_memory")
    assert loss < 1e-5
    for error, floor in zip(errors, head.floor, strict=True):
        assert error <= 1.05 * floor


def test_a_label_that_is_no_class_is_an_error_for_the_next_call(impl: str) -> None:
    logits, target = torch.randn(64, 5000, device="cuda"), torch.arange(64, device="cuda")
    with no_waiting():
        kernels.cross_entropy(logits, target.index_fill(0, target[3:4], 5000), impl=impl)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=r"target\[3\] = 5000 is not one of the 5000 classes"):
        kernels.cross_entropy(logits, target, impl=impl)
    kernels.cross_entropy(logits, target, impl=impl)
    with pytest.raises(IndexError, match=r"target\[3\] = 5000 is not one of the 5000 classes"):
        kernels.linear_cross_entropy(
            logits[:, :8], torch.randn(5000, 8, device="cuda"), target.index_fill(0, target[3:4], 5000), impl=impl
        )


def penalty(loss: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The gradients of `l + 10 |dl|^2`."""
    leaves = [one.detach().requires_grad_() for one in tensors]
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, create_graph=True)
    return torch.autograd.grad(value + 10 * sum(one.square().sum() for one in first), leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_order_is_exact(impl: str, reduction: Any) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, device="cuda", generator=generator)
    x, weight, target = draw(40, 24), draw(600, 24) / 5, torch.arange(40, device="cuda") * 7
    target[5] = -100
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def by(function: Any, **more: Any) -> Callable[..., Tensor]:
        return lambda *tensors: function(*tensors, target, **options, **more).sum()

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.t(), target, **options).sum()

    pairs = [
        (penalty(by(kernels.cross_entropy, impl=impl), x @ weight.t()), (by(F.cross_entropy), (x @ weight.t(),))),
        (penalty(by(kernels.linear_cross_entropy, impl=impl, chunk_rows=9), x, weight), (plain, (x, weight))),
    ]
    for ours, (reference, tensors) in pairs:
        for got, exact in zip(ours, penalty(reference, *(one.double() for one in tensors)), strict=True):
            assert relative(got, exact) < 1e-5  # float32


def test_second_derivatives_in_float64() -> None:
    """The automatic choice."""
    x, weight = (torch.randn(size, 4, dtype=torch.float64, device="cuda", requires_grad=True) for size in (4, 5))
    target = torch.tensor([0, -100, 3, 2], device="cuda")
    loss = partial(kernels.linear_cross_entropy, target=target, label_smoothing=0.1)
    assert torch.autograd.gradgradcheck(loss, (x, weight))
    assert torch.autograd.gradgradcheck(partial(kernels.cross_entropy, target=target), (x,))
    assert torch.autograd.gradgradcheck(lambda a: kernels.kl_pair(a, weight[:4], temperature=2.0), (x,))


def test_compiled_functions_return_the_same(impl: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, 64, device="cuda", generator=generator) for n in (96, 4000))
    target = torch.arange(96, device="cuda")

    def losses(x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.t()
        linear = kernels.linear_cross_entropy(x, weight, target, impl=impl)
        consistency = kernels.kl_pair(logits, logits.flip(0), impl="triton")
        return kernels.cross_entropy(logits * 2, target, impl=impl) + linear + consistency

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True)):
        leaves = [one.clone().requires_grad_() for one in (x, weight)]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(*results)


def peak_beyond_inputs(head: Head, *, frozen: bool, **options: Any) -> int:
    leaves = [head.x.clone().requires_grad_(), head.weight.clone().requires_grad_(not frozen)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.linear_cross_entropy(*leaves, head.target, **options).backward()
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_that_of_the_gradients_and_a_chunk(impl: str) -> None:
    head = Head(4096, 256, 20000)
    by_x, by_weight, wide = head.x.nbytes, head.weight.nbytes, 2 * head.weight.nbytes
    chunk = 256 * 20000 * (4 + 2)  # float32 logits and their gradient in half precision
    small = 4 << 20  # rows of losses, cuBLAS's own memory
    assert peak_beyond_inputs(head, frozen=False, impl=impl, chunk_rows=256) <= by_x + by_weight + wide + chunk + small
    assert peak_beyond_inputs(head, frozen=True, impl=impl, chunk_rows=256) <= by_x + chunk + small


def test_low_memory_is_that_of_the_gradients_and_a_block(impl: str) -> None:
    head = Head(4096, 256, 20000)
    blocks = 4096 * 2048 * (4 + 2)
    wide_x, small = 2 * head.x.nbytes, 4 << 20
    allowed = head.x.nbytes + head.weight.nbytes + wide_x + blocks + small
    assert peak_beyond_inputs(head, frozen=False, impl=impl, mode="low_memory") <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (300, 4097), (70, 30522)], ids=str)
def test_a_gradient_is_multiplied_by_what_comes_in(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, device="cuda").to(dtype)
    each = torch.linspace(-2.0, 2.0, shape[0], device="cuda")
    each[1] = 1.0
    for factor in (each, torch.tensor(3.0, device="cuda"), torch.tensor(1.0, device="cuda")):
        scaled = matrix.clone()
        scale_rows(scaled, factor)
        assert torch.equal(scaled, (matrix.float() * (factor.unsqueeze(-1) if factor.dim() else factor)).to(dtype))


def test_the_gradient_of_a_float32_head_under_autocast(impl: str) -> None:
    x, weight = torch.randn(300, 64, device="cuda"), torch.randn(5000, 64, device="cuda") / 8
    target = torch.randint(0, 5000, (300,), device="cuda")
    leaves = [one.clone().requires_grad_() for one in (x, weight)]
    with torch.autocast("cuda", dtype=HALF):
        kernels.linear_cross_entropy(*leaves, target, impl=impl).backward()
    exact = [one.to(HALF).double().requires_grad_() for one in (x, weight)]
    F.cross_entropy(exact[0] @ exact[1].t(), target).backward()
    for leaf, one in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative(leaf.grad, one.grad) < 2**-8  # only the gradient of the logits is rounded


@pytest.mark.parametrize("shape", [(16, 30, 64), (4, 500, 768)], ids=str)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_an_attack_step_does_not_wait(triton: str, shape: tuple[int, ...], norm: Any) -> None:
    delta, gradient = torch.zeros(shape, device="cuda"), torch.randn(shape, device="cuda")
    mask = torch.ones(shape[:2], dtype=torch.bool, device="cuda")
    step = partial(kernels.perturb_step, delta, gradient, mask, step_size=1.0, epsilon=0.5, norm=norm)
    step()  # compiles
    with no_waiting():
        moved = step()
    assert float(moved.flatten(1).norm(dim=1).min()) > 0


def test_kl_pair_and_cross_entropy_do_not_wait() -> None:
    rows = 600  # enough that plain torch is not preferred
    a, b = (torch.randn(rows, 30522, device="cuda", dtype=HALF, requires_grad=True) for _ in range(2))
    target = torch.arange(rows, device="cuda")

    def step() -> Tensor:
        loss = kernels.cross_entropy(a, target) + kernels.kl_pair(a, b)
        loss.backward()
        return loss

    kernels.reset_used()
    step()
    with no_waiting():
        loss = step()
    assert math.isfinite(float(loss))
    assert kernels.used()["cross_entropy"].keys() & {"cuda", "triton"} and kernels.used()["kl_pair"]["triton"]


def test_weights_move_and_return_bit_for_bit() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, device="cuda", generator=generator)
    weights = [draw(300, 70), draw(900).to(HALF) / 100, draw(5, 5, 5)]
    gradients, before = [draw(one.shape).to(one.dtype) for one in weights], [one.clone() for one in weights]
    for rule in ("sam", "asam", "awp"):
        with kernels.perturb_weights(weights, gradients, rule=rule, rho=2.0) as moved:
            assert not any(map(torch.equal, weights, before))
            assert moved.usable
        assert all(map(torch.equal, weights, before))


def test_a_patched_model_learns_the_same() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config).cuda().eval()
    ids = torch.randint(0, 30522, (32, 128), device="cuda")  # enough that plain torch is not preferred
    labels = ids.masked_fill(torch.rand(ids.shape, device="cuda") > 0.15, -100)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        return [one.grad.clone() for one in model.parameters() if one.grad is not None]

    plain = gradients()
    kernels.reset_used()
    with kernels.patch(model):
        ours = gradients()
    assert kernels.used()["linear_cross_entropy"].keys() <= {"cuda", "triton"}
    assert len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-9  # float32
