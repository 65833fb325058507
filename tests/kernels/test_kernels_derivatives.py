"""Derivatives of cross-entropy: every order, every transform, repeated backward passes, compiled graphs."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import stated_loss

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import native

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")

ours = partial(kernels.cross_entropy, impl="cpu")
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5], dtype=torch.float64)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "weight": WEIGHT},
    {"weight": WEIGHT},
    {"reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "ignore_index": 2},
]


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, -100, 4, 2])


SHAPED: list[dict[str, Any]] = [
    {"z_loss": 0.1, "weight": WEIGHT},
    {"softcap": 2.0, "scale": 1.5, "label_smoothing": 0.1},
    {"softcap": 2.0, "z_loss": 0.1, "reduction": "none"},
]


def valid(target: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    return target.clamp(min=0) if options.get("ignore_index", -100) != -100 else target


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(problem: Any, options: dict[str, Any]) -> None:
    logits, target = problem[0].requires_grad_(), valid(problem[1], options)
    check = partial(ours, target=target, **options)
    assert torch.autograd.gradcheck(check, (logits,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(check, (logits,), check_batched_grad=True)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [*OPTIONS[:4], *SHAPED])
def test_gradcheck_of_loss_and_lse(problem: Any, options: dict[str, Any], soft: bool) -> None:
    logits = problem[0].requires_grad_()
    target = torch.softmax(torch.randn(4, 5, dtype=torch.float64), -1) if soft else valid(problem[1], options)
    check = partial(ours, target=target, return_lse=True, **options)
    assert torch.autograd.gradcheck(check, (logits,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(check, (logits,), check_batched_grad=True)


@pytest.mark.parametrize("options", SHAPED)
@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))]
)
def test_shaped_losses_under_func_transforms(problem: Any, options: dict[str, Any], transform: Any) -> None:
    logits, target = problem

    def total(loss: Any, **more: Any) -> Any:
        def both(x: torch.Tensor) -> torch.Tensor:
            rows, lse = loss(x, target, **more, **options)
            return (rows * 1.5).sum() + lse.square().sum()

        return both

    results = [
        transform(total(loss, **more))(logits)
        for loss, more in ((kernels.cross_entropy, {"return_lse": True}), (stated_loss, {}))
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_third_derivative(problem: Any) -> None:
    logits, target = problem

    def penalty(x: torch.Tensor, loss: Any) -> torch.Tensor:
        (g,) = torch.autograd.grad(loss(x, target), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(3).sum(), x)[0]

    results = [penalty(logits.clone().requires_grad_(), loss) for loss in (ours, F.cross_entropy)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    ],
    ids=["grad", "hessian", "reverse-reverse", "forward-forward", "reverse-forward"],
)
def test_func_transforms(problem: Any, options: dict[str, Any], transform: Any, monkeypatch: Any) -> None:
    # The automatic choice, with no shape too small for it: forward mode must find its way to the reference.
    for limit in ("_FEWEST_CLASSES", "_FEWEST_ELEMENTS"):
        monkeypatch.setattr(importlib.import_module("hybridengine.kernels.cross_entropy.quick"), limit, 0)
    logits, target = problem[0], valid(problem[1], options)

    def total(loss: Any) -> Any:
        return lambda x: (loss(x, target, **options) * 1.5).sum()

    torch.testing.assert_close(
        transform(total(kernels.cross_entropy))(logits), transform(total(F.cross_entropy))(logits)
    )


def test_forward_mode_through_the_cotangent(problem: Any) -> None:
    logits, target = problem
    results = []
    for loss in (ours, F.cross_entropy):
        _, pull_back = torch.func.vjp(lambda x, loss=loss: loss(x, target, reduction="none"), logits)
        incoming = torch.arange(4, dtype=torch.float64)
        results.append(torch.func.jvp(lambda c, pull=pull_back: pull(c)[0], (incoming,), (incoming + 1,)))
    torch.testing.assert_close(*results)


def test_forward_mode_by_name_is_refused(problem: Any) -> None:
    with pytest.raises(KernelUnavailable, match="forward-mode"):
        torch.func.jvp(lambda x: ours(x, problem[1]), (problem[0],), (problem[0],))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batched_weight", [False, True])
def test_vmap(reduction: str, batched_weight: bool) -> None:
    torch.manual_seed(5)
    logits, target = torch.randn(5, 3, 6, dtype=torch.float64), torch.randint(0, 5, (3, 6))
    target[1, 2] = -100
    weight = torch.rand((3, 5) if batched_weight else (5,), dtype=torch.float64) + 0.5
    dims = (2 - 1, 0, 0 if batched_weight else None)

    def each(loss: Any, x: Any, t: Any, w: Any) -> Any:
        return loss(x.t(), t, weight=w, reduction=reduction).sum()

    for wrap in (
        lambda f: torch.vmap(f, dims),
        lambda f: torch.vmap(torch.func.grad(f), dims),
        lambda f: torch.func.grad(lambda x, t, w: torch.vmap(f, dims)(x, t, w).sum()),
    ):
        got, expected = (wrap(partial(each, loss))(logits, target, weight) for loss in (ours, F.cross_entropy))
        torch.testing.assert_close(got, expected)


def test_a_second_backward_gives_the_same_gradient_in_another_buffer() -> None:
    logits = torch.randn(40, 9000, requires_grad=True)
    loss = ours(logits, torch.arange(40))
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(0.5), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(0.5), retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept) and torch.equal(second, kept)
    torch.testing.assert_close(third.detach() * 0.5, kept)
    third.square().sum().backward()
    assert logits.grad is not None and bool(logits.grad.any())


def test_accumulating_into_grad_does_not_change_the_next_backward() -> None:
    logits = torch.randn(40, 9000, requires_grad=True)
    loss = ours(logits, torch.arange(40))
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


def test_in_place_the_logits_become_their_gradient() -> None:
    head, hidden, target = torch.randn(5000, 16, requires_grad=True), torch.randn(40, 16), torch.arange(40)
    expected = torch.autograd.grad(ours(hidden @ head.t(), target) * 0.5, head)[0]
    logits = hidden @ head.t()
    loss = kernels.cross_entropy(logits, target, inplace=True, impl="cpu") * 0.5
    seen: list[torch.Tensor] = []
    logits.register_hook(seen.append)
    (got,) = torch.autograd.grad(loss, head, retain_graph=True)
    torch.testing.assert_close(got, expected)
    assert seen[0].data_ptr() == logits.data_ptr()
    for again in ({}, {"create_graph": True}):
        with pytest.raises(RuntimeError, match="overwritten its logits"):
            torch.autograd.grad(loss, head, retain_graph=True, **again)


def test_in_place_an_operation_that_needs_the_logits_hears_of_it() -> None:
    x = torch.randn(40, 5000, requires_grad=True)
    logits = x.exp()  # its gradient is made of its result
    loss = kernels.cross_entropy(logits, torch.arange(40), inplace=True, impl="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_is_a_permission_that_leaves_alone_what_it_must() -> None:
    target = torch.arange(40)
    leaf = torch.randn(40, 5000, requires_grad=True)
    expected = torch.autograd.grad(ours(leaf, target), leaf)[0]
    for logits in (leaf, (leaf * 1).t().contiguous().t()):  # a leaf; rows that are not contiguous
        kept = logits.detach().clone()
        loss = kernels.cross_entropy(logits, target, inplace=True, impl="cpu")
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
        assert torch.equal(logits.detach(), kept)
    with torch.no_grad():
        kernels.cross_entropy(leaf * 1, target, inplace=True, impl="cpu")


@pytest.mark.parametrize("want_gradient", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_opcheck(want_gradient: bool, soft: bool) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64)
    target = torch.softmax(torch.randn_like(logits), -1) if soft else torch.tensor([0, -100, 4, 2])
    for reduction in (0, 1):
        options = (-100, 0.1, 1.5, 2.0, 0.1, reduction, False)
        operators = torch.ops.hybridengine
        torch.library.opcheck(operators.cross_entropy, (logits, target, WEIGHT, *options, want_gradient, "cpu"))
        torch.library.opcheck(operators.cross_entropy_, (logits.clone(), target, None, *options, "cpu"))
        coming = torch.ones(4 if reduction == 0 else (), dtype=torch.float64)
        arguments = (coming, torch.ones(4, dtype=torch.float64), logits, target, WEIGHT, *options, "cpu")
        torch.library.opcheck(operators.cross_entropy_backward, arguments)


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    logits = torch.randn(40, 9000, requires_grad=True)
    with torch.no_grad():
        assert not ours(logits, torch.arange(40)).requires_grad
    assert not ours(logits.detach(), torch.arange(40)).requires_grad
    with torch.inference_mode():
        ours(logits.detach(), torch.arange(40))


def test_under_autocast_the_loss_is_float32() -> None:
    hidden, head = torch.randn(32, 8), torch.randn(5000, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(hidden @ head.t(), torch.arange(32))
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.grad is not None and head.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    logits, target = torch.randn(40, 5000).to(dtype).requires_grad_(), torch.arange(40)

    def step(x: torch.Tensor) -> torch.Tensor:
        return 3 * ours(x * 2, target, label_smoothing=0.1)

    (expected,) = torch.autograd.grad(step(logits), logits)
    loss = torch.compile(step, fullgraph=True)(logits)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, step(logits))
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_the_choice_for_small_shapes_compiles_too() -> None:
    torch._dynamo.reset()
    logits, target = torch.randn(6, 3, requires_grad=True), torch.zeros(6, dtype=torch.int64)
    compiled = torch.compile(lambda x: kernels.cross_entropy(x, target), fullgraph=True)
    torch.testing.assert_close(compiled(logits), F.cross_entropy(logits, target))
