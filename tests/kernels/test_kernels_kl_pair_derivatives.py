"""Derivatives of the divergence: every order, every transform, repeated backward passes, compiled graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kl_pair_cases import DIRECTIONS, IMPLEMENTATIONS, INTERPRETED, plain
from torch import Tensor

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import native

pytestmark = pytest.mark.skipif(
    native.why_missing() is not None and not INTERPRETED, reason=native.why_missing() or "the interpreter"
)
in_one_process = pytest.mark.skipif(INTERPRETED, reason="the tests by CPU implementations run without the interpreter")
KERNEL = [impl for impl in IMPLEMENTATIONS if impl != "reference"]

ours = partial(kernels.kl_pair, impl="cpu")
MASK = torch.tensor([True, False, True, True])
OPTIONS: list[dict[str, Any]] = [
    *({"direction": direction} for direction in DIRECTIONS),
    {"reduction": "mean", "mask": MASK, "temperature": 2.0},
    {"reduction": "none", "mask": MASK, "direction": "reverse"},
    {"reduction": "none", "direction": "forward", "temperature": 0.5},
]
TRANSFORMS = {
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,
    "reverse-reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "forward-forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "reverse-forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
}


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    return a, b


@in_one_process
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(pair: Any, options: dict[str, Any]) -> None:
    a, b = (x.requires_grad_() for x in pair)
    for inputs, check in (
        ((a, b), partial(ours, **options)),
        ((a,), lambda x: ours(x, b.detach(), **options)),
        ((b,), lambda y: ours(a.detach(), y, **options)),
    ):
        assert torch.autograd.gradcheck(check, inputs, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(check, inputs, check_batched_grad=True)


@in_one_process
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("name", "impl"),
    # By name only what has no forward mode in it.
    [*((name, None) for name in TRANSFORMS), ("grad", "cpu"), ("reverse-reverse", "cpu")],
)
def test_func_transforms(pair: Any, options: dict[str, Any], name: str, impl: str | None) -> None:
    a, b = pair
    transform = TRANSFORMS[name]

    def total(loss: Any, **more: Any) -> Any:
        # One number of both, so that the mixed second derivatives are seen too.
        return lambda z: (loss(z[:4], z[4:], **options, **more) * 1.5).square().sum()

    both = torch.cat([a, b])
    got, expected = transform(total(kernels.kl_pair, impl=impl))(both), transform(total(plain_whole))(both)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def plain_whole(a: Tensor, b: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """`plain` without indexing by the mask, which vmap cannot."""
    rows = plain(a, b, **options | {"reduction": "none"})
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    reduction = options.get("reduction", "sum")
    if reduction == "mean":
        return rows.sum() / (rows.shape[0] if mask is None else mask.sum())
    return rows if reduction == "none" else rows.sum()


@in_one_process
@pytest.mark.parametrize("impl", ["cpu", None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [None, "one", "each"])
def test_vmap(reduction: str, masked: str | None, impl: str | None) -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((5, 3, 6), (6, 5)))
    mask = {None: None, "one": torch.arange(6) < 4, "each": torch.rand(3, 6, generator=generator) < 0.6}[masked]
    dims = (1, None, 0 if masked == "each" else None)

    def each(loss: Any, x: Any, y: Any, m: Any) -> Any:
        return loss(x.t(), y, mask=m, reduction=reduction).sum()

    for wrap in (
        lambda f: torch.vmap(f, dims),
        lambda f: torch.vmap(torch.func.grad(f, (0, 1)), dims),
        lambda f: torch.func.grad(lambda x, y, m: torch.vmap(f, dims)(x, y, m).sum(), (0, 1)),
    ):
        got, expected = (wrap(partial(each, f))(a, b, mask) for f in (partial(kernels.kl_pair, impl=impl), plain_whole))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@in_one_process
def test_third_derivative(pair: Any) -> None:
    def penalty(x: Tensor, y: Tensor, loss: Any) -> Any:
        g = torch.autograd.grad(loss(x, y), (x, y), create_graph=True)
        h = torch.autograd.grad(g[0].square().sum() + g[1].sin().sum(), (x, y), create_graph=True)
        return torch.autograd.grad(h[0].pow(3).sum() + h[1].sum(), (x, y))

    results = [penalty(*(x.clone().requires_grad_() for x in pair), loss) for loss in (ours, plain)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@in_one_process
def test_forward_mode_by_name_is_refused(pair: Any) -> None:
    with pytest.raises(KernelUnavailable, match="forward-mode"):
        torch.func.jvp(lambda x: ours(x, pair[1]), (pair[0],), (pair[0],))


@in_one_process
def test_the_hessian_is_whole_at_excluded_classes_and_masked_rows() -> None:
    a, b = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    a[0, 1] = b[0, 1] = -float("inf")
    a[1] = float("nan")
    mask = torch.tensor([True, False, True])
    a.requires_grad_()
    (first,) = torch.autograd.grad(ours(a, b, mask=mask), a, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), a)
    kept = a.detach()[0, [0, 2, 3]].requires_grad_()
    (g,) = torch.autograd.grad(plain(kept[None], b[:1, [0, 2, 3]]), kept, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), kept)
    torch.testing.assert_close(second[0, [0, 2, 3]], expected)
    assert not bool(second[1].any()) and float(second[0, 1]) == 0


@pytest.mark.parametrize("impl", KERNEL)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_backward_gives_the_same_gradients_in_other_buffers(impl: str, reduction: Any) -> None:
    a, b = (torch.randn(4, 900, requires_grad=True) for _ in range(2))
    loss = kernels.kl_pair(a, b, reduction=reduction, impl=impl)
    incoming = torch.full_like(loss, 0.5)
    first = torch.autograd.grad(loss, (a, b), incoming, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (a, b), incoming, retain_graph=True)
    third = torch.autograd.grad(loss, (a, b), incoming, create_graph=True)
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(first, second, strict=True))
    for x, y, z, w in zip(first, kept, second, third, strict=True):
        assert torch.equal(x, y) and torch.equal(z, y)
        torch.testing.assert_close(w.detach(), y)


@pytest.mark.parametrize("impl", KERNEL)
def test_accumulating_into_grad_does_not_change_the_next_backward(impl: str) -> None:
    a, b = (torch.randn(4, 900, requires_grad=True) for _ in range(2))
    loss = kernels.kl_pair(a, b, impl=impl)
    loss.backward(retain_graph=True)
    assert a.grad is not None and b.grad is not None
    once = a.grad.clone(), b.grad.clone()
    loss.backward()
    torch.testing.assert_close((a.grad, b.grad), (2 * once[0], 2 * once[1]))


@in_one_process
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_a_gradient_is_computed_only_for_what_requires_one(wanted: tuple[bool, bool], monkeypatch: Any) -> None:
    made: list[tuple[int, ...]] = []
    empty = native.empty
    monkeypatch.setattr(native, "empty", lambda shape, dtype: made.append(shape) or empty(shape, dtype))
    a, b = (torch.randn(4, 900, requires_grad=want) for want in wanted)
    loss = ours(a, b)
    assert loss.requires_grad == any(wanted)
    assert sorted(made) == sorted([(4, 900)] * sum(wanted) + [(0,)] * (2 - sum(wanted)))
    made.clear()
    with torch.no_grad():
        assert not ours(a, b).requires_grad
    with torch.inference_mode():
        ours(a.detach(), b.detach())
    assert made == [(0,)] * 4


@in_one_process
def test_the_operator_keeps_its_contract() -> None:
    op = torch.ops.hybridengine.kl_pair.default
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(4, 9).to(dtype), torch.randn(4, 9).to(dtype)
        for mask, reduction, want_a, want_b in ((None, 1, True, True), (MASK, 0, True, False), (MASK, 2, False, False)):
            torch.library.opcheck(op, (a, b, mask, 2.0, 2, reduction, False, want_a, want_b, "cpu"))


@in_one_process
def test_under_autocast_the_loss_is_float32() -> None:
    hidden, head = torch.randn(32, 8), torch.randn(500, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(hidden @ head.t(), hidden.flip(0) @ head.t())
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.grad is not None and head.grad.dtype == torch.float32


@in_one_process
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(backend: str, reduction: str) -> None:
    torch._dynamo.reset()
    a, b = (torch.randn(4, 500, requires_grad=True) for _ in range(2))

    def step(x: Tensor, y: Tensor) -> Tensor:
        return 3 * ours(x * 2, y, mask=MASK, temperature=2.0, reduction=reduction).sum()  # type: ignore[arg-type]

    expected = torch.autograd.grad(step(a, b), (a, b))
    loss = torch.compile(step, fullgraph=True, backend=backend)(a, b)
    torch.testing.assert_close(loss, step(a, b))
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), expected)
