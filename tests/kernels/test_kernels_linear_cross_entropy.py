"""Linear cross-entropy: against float64 torch, what it must not compute, and every derivative."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import stated_loss, wide
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hybridengine import kernels
from hybridengine.errors import KernelUnavailable
from hybridengine.kernels import native
from hybridengine.kernels.linear_cross_entropy.chunks import rows_per_chunk, rows_without_sum
from hybridengine.kernels.linear_cross_entropy.rows import Head, Split

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")

ours = partial(kernels.linear_cross_entropy, impl="cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MODES = ["auto", "low_memory"]
# bfloat16 is multiplied in tiles or widened.
if native.has_tiles():
    ISAS = ["avx512", "amx"]
else:
    ISAS = ["-"] if native.why_missing() is not None else [native.module().isa()]


@contextmanager
def on(isa: str) -> Iterator[None]:
    before = kernels.set_isa(isa)
    try:
        yield
    finally:
        kernels.set_isa(before)


@dataclass
class Case:
    tensors: dict[str, Tensor]  # x, weight and perhaps bias
    wanted: tuple[bool, ...]
    target: Tensor
    options: dict[str, Any]
    use_lse: bool

    def outcome(self, function: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, log-sum-exps and the wanted gradients, in float64."""
        leaves = {
            name: one.detach().to(dtype or one.dtype).requires_grad_(want)
            for (name, one), want in zip(self.tensors.items(), self.wanted, strict=False)
        }
        loss, lse = function(**leaves, target=self.target, **self.options)
        total = (loss * torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()
        if self.use_lse:
            total = total + (lse * torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype)).sum()
        trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        gradients = torch.autograd.grad(total, list(trained.values())) if trained else ()
        named = dict(zip(trained, (one.double() for one in gradients), strict=True))
        return loss.detach().double(), lse.detach().double(), named


def stated(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any) -> Any:
    dtype = wide(x.dtype)
    logits = x.to(dtype) @ weight.to(dtype).t()
    options["weight"] = options.pop("class_weight", None)
    return stated_loss(logits if bias is None else logits + bias.to(dtype), target, **options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, width = draw(st.integers(1, 9)), draw(st.sampled_from([1, 3, 8, 17]))
    classes = draw(st.sampled_from([1, 2, 7, 33, 300, 5000]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, width, generator=generator).to(dtype)
    head_dtype = torch.float32 if dtype == torch.bfloat16 and draw(st.booleans()) else dtype
    weight = (torch.randn(classes, width, generator=generator) * draw(st.sampled_from([0.1, 2.0]))).to(head_dtype)
    layout = draw(st.sampled_from(["", "turned", "apart"]))
    if layout == "turned":
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    elif layout == "apart":
        x, weight = (one.repeat_interleave(2, 1)[:, ::2] for one in (x, weight))
    tensors = {"x": x, "weight": weight}
    if draw(st.booleans()):
        tensors["bias"] = torch.randn(classes, generator=generator).to(head_dtype)
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        **draw(st.sampled_from([{}, {}, {"z_loss": 0.01}, {"softcap": 5.0, "scale": 0.5}])),
    }
    target = torch.randint(0, classes, (rows,), generator=generator)
    if draw(st.booleans()):
        target[torch.rand(rows, generator=generator) < 0.4] = -100
        target[0] = classes - 1
    elif draw(st.booleans()):
        target = torch.softmax(torch.randn(rows, classes, generator=generator), -1)
    if draw(st.booleans()):
        options["class_weight"] = torch.rand(classes, generator=generator) + 0.5
    wanted = tuple(draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    return Case(tensors, wanted, target, options, use_lse=draw(st.booleans()))


def check_on(case: Case, isa: str, mode: str, chunk_rows: int) -> None:
    """Relative errors in norm, not above twice those of the formula in plain float32 (float64), or what rounding costs.

    Rounding a gradient to its dtype costs half an eps of each entry; a float32 sum of n terms of one size costs below
    n eps of their norm, and none is longer than rows + classes + width here. In float64 both sides round.
    """
    untouched = {name: one.clone() for name, one in case.tensors.items()}
    run = partial(ours, return_lse=True, mode=mode, chunk_rows=chunk_rows)
    with on(isa):
        got = case.outcome(run)
    exact, plain = case.outcome(stated, torch.float64), case.outcome(stated)
    x, weight = case.tensors["x"], case.tensors["weight"]
    terms = sum(x.shape) + len(weight)
    eps = torch.finfo(wide(x.dtype)).eps
    # A logit is a sum of `width` products; the loss and the gradients inherit its absolute error.
    logit = float((x.double().abs() @ weight.double().abs().t()).max()) + 10
    slack = 4 * eps * logit * terms
    for one, right in zip(got[:2], exact[:2], strict=True):
        assert float((one - right).abs().max()) <= slack * (1 + 2 * case.options.get("z_loss", 0.0) * logit)
    assert got[2].keys() == exact[2].keys()
    for name, gradient in got[2].items():
        dtype, size = case.tensors[name].dtype, float(exact[2][name].norm())
        error, its = (float((one[2][name] - exact[2][name]).norm()) for one in (got, plain))
        assert gradient.isfinite().all()
        assert error <= 2 * its + torch.finfo(dtype).eps * size + 16 * slack * max(size, 1.0), name
    assert all(torch.equal(one, untouched[name]) for name, one in case.tensors.items())


ANY_SPLIT = {"isa": st.sampled_from(ISAS), "mode": st.sampled_from(MODES), "chunk_rows": st.integers(1, 10)}


@settings(max_examples=500, deadline=None)
@given(case=cases(), **ANY_SPLIT)
def test_not_further_from_float64_than_twice_torch(case: Case, isa: str, mode: str, chunk_rows: int) -> None:
    check_on(case, isa, mode, chunk_rows)


@pytest.mark.long
@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(case=cases(), **ANY_SPLIT)
def test_not_further_from_float64_than_twice_torch_at_length(case: Case, isa: str, mode: str, chunk_rows: int) -> None:
    check_on(case, isa, mode, chunk_rows)


def relative(one: Tensor, exact: Tensor) -> float:
    return float((one.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_rows", [16, 100, 512])
@pytest.mark.parametrize("spread", [0.05, 0.6])
def test_half_precision_gradients_are_rounded_once(isa: str, mode: str, chunk_rows: int, spread: float) -> None:
    """Whatever the chunk, the error of bfloat16 gradients is that of writing them down: within 5%."""
    torch.manual_seed(0)
    x, weight = torch.randn(512, 64).bfloat16(), (torch.randn(1500, 64) * spread).bfloat16()
    target = torch.randint(0, 1500, (512,))
    leaves = [one.detach().clone().requires_grad_() for one in (x, weight)]
    with on(isa):
        loss = ours(*leaves, target, mode=mode, chunk_rows=chunk_rows)
        loss.backward()
    exact = [one.detach().double().requires_grad_() for one in (x, weight)]
    right = F.cross_entropy(exact[0] @ exact[1].t(), target)
    right.backward()
    assert abs(float(loss.detach()) / float(right.detach()) - 1) < 1e-6
    for leaf, one in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and one.grad is not None
        floor = relative(one.grad.bfloat16(), one.grad)
        assert relative(leaf.grad, one.grad) <= 1.05 * floor


def test_all_rows_at_once_only_to_spare_a_sum() -> None:
    """In tiles one chunk needs no wide sum of the head's gradient; where none is made, chunks are as usual."""
    x, weight = torch.randn(1200, 1024).bfloat16(), torch.randn(8000, 1024).bfloat16()
    head = Head(x, weight, None, torch.zeros(1200, dtype=torch.int64), None)
    assert rows_per_chunk(head, torch.bfloat16) == 1200
    assert rows_without_sum(head, Split(1200, 0, torch.bfloat16)) == 256
    assert rows_without_sum(head, Split(7, 0, torch.bfloat16)) == 7
    assert rows_per_chunk(head._replace(weight=weight.float()), torch.bfloat16) == 256, "the sum is the gradient"
    assert rows_per_chunk(head, torch.float32) == 256, "widened"


@pytest.mark.parametrize("isa", ISAS)
def test_a_heavy_row_does_not_round_the_others(isa: str) -> None:
    """Of two bfloat16 numbers in tiles: which entries are small is a matter of each row."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 32).bfloat16().float().requires_grad_(), torch.randn(30000, 32).bfloat16()
    target, coming = torch.randint(0, 30000, (40,)), torch.ones(40)
    coming[3] = 1e4
    with on(isa), torch.autocast("cpu", torch.bfloat16):
        loss = ours(x, weight, target, reduction="none", chunk_rows=40)
    (got,) = torch.autograd.grad(loss @ coming, x)
    exact = x.detach().double().requires_grad_()
    plain = F.cross_entropy(exact @ weight.double().t(), target, reduction="none")
    (right,) = torch.autograd.grad(plain @ coming.double(), exact)
    assert float(((got - right).norm(dim=1) / right.norm(dim=1)).max()) < 4e-4  # an eighth of the rounding to 8 bits


@pytest.mark.skipif(not native.has_tiles(), reason="this CPU does not multiply in tiles (AMX)")
def test_what_began_in_tiles_ends_without_them() -> None:
    """As a program does that was exported on another machine."""
    x, weight = (torch.randn(count, 64).bfloat16().requires_grad_() for count in (300, 4000))
    loss, lse = ours(x, weight, torch.arange(300), return_lse=True)
    with on("avx512"):
        gradients = torch.autograd.grad(loss + lse.sum(), (x, weight))
    assert all(bool(one.isfinite().all()) for one in gradients)


def test_a_confident_label_keeps_its_gradient() -> None:
    """At a probability of 0.9999 the label's p - 1 is right to 0.5% in bfloat16, where rounded logits are off by 4%."""
    x = torch.zeros(4, 8).bfloat16()
    x[:, 0] = 1.0
    weight = torch.zeros(1000, 8)
    weight[3, 0] = float(torch.log(torch.tensor(9999.0 * 999)))
    weight = weight.bfloat16().requires_grad_()
    ours(x, weight, torch.full((4,), 3)).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ exact.t(), torch.full((4,), 3)).backward()
    assert weight.grad is not None and exact.grad is not None
    assert abs(float(weight.grad[3, 0]) / float(exact.grad[3, 0]) - 1) < 0.005


def flops(head: dict[str, Tensor], wanted: list[bool], target: Tensor, split: tuple[int, int] = (64, 0)) -> int:
    """The arithmetic of matrix products in one call of the operator's kernel."""
    package = "hybridengine.kernels.linear_cross_entropy"
    run = importlib.import_module(f"{package}.cpu")._run
    rows = importlib.import_module(f"{package}.rows")
    options = importlib.import_module("hybridengine.kernels.cross_entropy.options").Options
    problem = rows.Head(head["x"], head["weight"], None, target, None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(
            problem,
            options(-100, 0.0, 1.0, 0.0, 0.0, 1, False),
            rows.Split(*split, torch.float32),
            rows.Wanted(*wanted),
        )
    return counter.get_total_flops()


def test_nothing_is_computed_for_what_is_frozen_or_ignored() -> None:
    head = {"x": torch.randn(200, 16), "weight": torch.randn(500, 16)}
    target = torch.randint(0, 500, (200,))
    product = 2 * 200 * 16 * 500
    for wanted, products in (([1, 1, 0], 3), ([1, 0, 0], 2), ([0, 1, 0], 2), ([0, 0, 0], 1)):
        assert flops(head, [bool(one) for one in wanted], target) == products * product
    target[50:] = -100
    assert flops(head, [True, True, False], target) == 3 * product // 4
    assert flops(head, [True, True, False], target, (64, 100)) == 4 * product // 4  # some classes at a time
    assert flops(head, [True, True, False], torch.full((200,), -100)) == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_logits_of_all_rows_never_exist(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes = 2048, 8000
    x = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(classes, 8).bfloat16().requires_grad_()
    target = torch.randint(0, classes, (rows,))
    largest: list[int] = []
    empty = native.empty

    def spy(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = empty(shape, dtype)
        largest.append(made.numel() * made.itemsize)
        return made

    monkeypatch.setattr(native, "empty", spy)
    with torch.profiler.profile(profile_memory=True) as profile:
        ours(x, weight, target, mode=mode).backward()
    memory = [event.cpu_memory_usage for event in profile.events()]
    assert max(memory + largest) <= rows * classes  # a quarter of the logits in float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "label_smoothing": 0.1, "softcap": 3.0},
        {"reduction": "sum", "z_loss": 0.1, "class_weight": torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5]).double()},
    ],
)
def test_gradcheck(mode: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    target = torch.tensor([0, -100, 4, 2])

    def check(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return ours(x, weight, target, bias=bias, mode=mode, chunk_rows=3, return_lse=True, **options)

    assert torch.autograd.gradcheck(check, (x, weight, bias))
    assert torch.autograd.gradgradcheck(check, (x, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_third_derivative_equals_plain_torch(reduction: str) -> None:
    torch.manual_seed(2)
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((7, 3), (11, 3), (11,))]
    target = torch.randint(0, 11, (7,))
    results = []
    for function in (
        lambda x, w, b: ours(x, w, target, bias=b, reduction=reduction, chunk_rows=2),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, reduction=reduction),
    ):
        leaves = [one.clone().requires_grad_() for one in tensors]
        first = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(one.pow(3).sum() for one in second), leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_maml_over_the_head_equals_plain_torch() -> None:
    """One inner step on the head, then the outer gradient by its start."""
    torch.manual_seed(3)
    x, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    target = torch.randint(0, 9, (6,))
    results = []
    for loss in (partial(ours, chunk_rows=2), lambda x, w, t: F.cross_entropy(x @ w.t(), t)):
        start, features = weight.clone().requires_grad_(), x.clone().requires_grad_()
        (inner,) = torch.autograd.grad(loss(features, start, target), start, create_graph=True)
        outer = loss(features, start - 0.5 * inner, target)
        results.append(torch.autograd.grad(outer, (start, features)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("transform", "batched"),
    [
        (torch.func.grad, False),
        (torch.func.hessian, False),
        (lambda f: torch.func.jacrev(torch.func.jacrev(f)), False),
        (lambda f: torch.vmap(torch.func.grad(f)), True),
    ],
    ids=["grad", "hessian", "reverse-reverse", "vmap-grad"],
)
def test_func_transforms_are_left_to_plain_torch(
    transform: Any, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = importlib.import_module("hybridengine.kernels.linear_cross_entropy.cpu")
    monkeypatch.setattr(cpu, "_FEWEST_LOGITS", 0)
    x, weight = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    target = torch.tensor([0, 4, 2, 2])
    point = x if batched else x[0]
    torch.testing.assert_close(
        transform(lambda x: kernels.linear_cross_entropy(x, weight, target))(point),
        transform(lambda x: F.cross_entropy(x @ weight.t(), target))(point),
        rtol=1e-9,
        atol=1e-12,
    )
    with pytest.raises(KernelUnavailable, match=r"torch\.func"):
        torch.func.grad(lambda x: ours(x, weight, target))(x[0])


def test_a_second_backward_gives_the_same_gradient_in_another_buffer() -> None:
    x, weight = torch.randn(300, 16, requires_grad=True), torch.randn(5000, 16, requires_grad=True)
    loss = ours(x, weight, torch.arange(300))
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(0.5), retain_graph=True)
    kept = [one.clone() for one in first]
    second = torch.autograd.grad(loss, (x, weight), torch.tensor(0.5), retain_graph=True)
    for a, b, c in zip(first, kept, second, strict=True):
        assert a.data_ptr() != c.data_ptr()
        assert torch.equal(a, b)
        torch.testing.assert_close(c, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("isa", ISAS)
def test_under_autocast_results_are_not_rounded(isa: str) -> None:
    """Nor is the head, unless it is multiplied in tiles: those are why autocast was asked for."""
    x, weight = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(20000, 32, requires_grad=True)
    target = torch.arange(64)
    with on(isa), torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(x, weight, target)
        loss.backward()
    assert loss.dtype == torch.float32
    multiplied = weight.bfloat16().float() if isa == "amx" else weight
    torch.testing.assert_close(loss, F.cross_entropy(x.float() @ multiplied.t(), target))
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_and_edges(impl: str, mode: str) -> None:
    run = partial(kernels.linear_cross_entropy, impl=impl, mode=mode)  # type: ignore[arg-type]
    weight = torch.randn(7, 3, requires_grad=True)
    for target in (torch.full((4,), -100), torch.zeros(0, dtype=torch.int64)):
        for empty in ("nan", "zero"):
            x = torch.randn(len(target), 3, requires_grad=True)
            loss = run(x, weight, target, empty=empty)  # type: ignore[arg-type]
            gradients = torch.autograd.grad(loss, (x, weight))
            assert bool(loss.isnan()) if empty == "nan" else float(loss.detach()) == 0.0
            assert not any(bool(one.any()) for one in gradients)
    x = torch.randn(3, 3)
    x[1] = float("nan")
    x.requires_grad_()
    loss = run(x, weight, torch.tensor([1, -100, 2]))
    loss.backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and not bool(x.grad[1].any())
    with pytest.raises(IndexError, match=r"target\[1\] = 7 is not one of the 7 classes"):
        run(torch.randn(2, 3), weight, torch.tensor([0, 7]))


@pytest.mark.parametrize("mode", MODES)
def test_transposed_states_and_nothing_with_probabilities(mode: str) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    weight = torch.randn(7, 3)
    target = torch.tensor([0, 1, -100, 3, 4])
    (got,) = torch.autograd.grad(ours(x.t(), weight, target, mode=mode), x)
    (expected,) = torch.autograd.grad(F.cross_entropy(x.t() @ weight.t(), target), x)
    torch.testing.assert_close(got, expected)
    assert float(ours(torch.zeros(0, 3), weight, torch.zeros(0, 7), reduction="sum", mode=mode)) == 0.0


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_states_of_ignored_rows_may_hold_nan_to_second_order(impl: str) -> None:
    x, weight = torch.randn(3, 3), torch.randn(7, 3, requires_grad=True)
    x[1] = float("nan")
    loss = kernels.linear_cross_entropy(x, weight, torch.tensor([1, -100, 2]), impl=impl)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), weight)
    assert bool(gradient.isfinite().all()) and bool(second.isfinite().all())


@pytest.mark.parametrize("half", ["x", "weight"])
def test_float16_gradients_wait_for_the_loss_scale(half: str) -> None:
    """The gradients of a mean over many rows are nothing in float16; times the loss scale they are something."""
    torch.manual_seed(0)
    tensors = {"x": torch.randn(64, 8), "weight": torch.randn(3000, 8)}
    tensors[half] = tensors[half].half()
    target = torch.randint(0, 3000, (64,))
    leaf = tensors[half].clone().requires_grad_()
    loss = ours(**{**tensors, half: leaf}, target=target, reduction="sum") * 1e-6
    (got,) = torch.autograd.grad(loss, leaf, torch.tensor(65536.0))
    wide = {name: one.double() for name, one in tensors.items()}
    exact = wide[half].requires_grad_()
    right = F.cross_entropy(wide["x"] @ wide["weight"].t(), target, reduction="sum") * (65536e-6)
    (expected,) = torch.autograd.grad(right, exact)
    # Rounded once; what is below float16's normal numbers loses digits, but is a small part of the whole.
    assert float((got.double() - expected).norm() / expected.norm()) < torch.finfo(torch.float16).eps


def test_shapes_of_sequences_and_wrong_shapes() -> None:
    x, weight = torch.randn(2, 5, 3), torch.randn(7, 3)
    target = torch.randint(0, 7, (2, 5))
    rows, lse = ours(x, weight, target, reduction="none", return_lse=True)
    assert rows.shape == lse.shape == (2, 5)
    expected = F.cross_entropy((x @ weight.t()).transpose(1, 2), target, reduction="none")
    torch.testing.assert_close(rows, expected)
    soft = torch.softmax(torch.randn(2, 5, 7), -1)
    torch.testing.assert_close(
        ours(x, weight, soft), F.cross_entropy((x @ weight.t()).transpose(1, 2), soft.transpose(1, 2))
    )
    for wrong in ((x, weight[:, :2], target), (x, weight, target[:, :4]), (x, weight, target.float())):
        with pytest.raises(ValueError, match="expected"):
            ours(*wrong)
    for option in ({"bias": torch.zeros(6)}, {"class_weight": torch.zeros(3)}):
        with pytest.raises(ValueError, match="one for each class"):
            ours(x, weight, target, **option)
    for option in ({"mode": "fast"}, {"reduction": "avg"}, {"softcap": -1.0}, {"chunk_rows": 0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            kernels.linear_cross_entropy(x, weight, target, **option)


def test_the_module_is_the_function() -> None:
    module = kernels.LinearCrossEntropyLoss(4, 9, bias=True, reduction="sum", softcap=3.0)
    x, target = torch.randn(6, 4), torch.randint(0, 9, (6,))
    linear = module.linear
    expected = kernels.linear_cross_entropy(x, linear.weight, target, bias=linear.bias, reduction="sum", softcap=3.0)
    assert torch.equal(module(x, target), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_graph_break(mode: str, reduction: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x, weight = (torch.randn(count, 16, dtype=dtype, requires_grad=True) for count in (40, 3000))
    target = torch.arange(40)

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return 3 * ours(x * 2, weight, target, mode=mode, reduction=reduction, label_smoothing=0.1).sum()  # type: ignore[arg-type]

    expected = torch.autograd.grad(step(x, weight), (x, weight))
    loss = torch.compile(step, fullgraph=True)(x, weight)
    torch.testing.assert_close(loss, step(x, weight))
    # The compiler keeps in float32 what eager rounds between two operations. In bfloat16 an entry near zero is
    # what remains of terms as large as the largest entries, each of them rounded once more or once less.
    bound = max(1e-5, torch.finfo(dtype).eps * max(one.abs().max().item() for one in expected))
    for got, right in zip(torch.autograd.grad(loss, (x, weight)), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=4 * torch.finfo(dtype).eps, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [False, False, False]])
def test_opcheck(wanted: list[bool], dtype: torch.dtype) -> None:
    tensors = [torch.randn(*s).to(dtype) for s in ((6, 3), (5, 3), (5,))]
    arguments = (*tensors, torch.randint(0, 5, (6,)), None, -100, 0.1, 1.0, 0.0, 0.0)
    for reduction in (0, 1):
        rest = (reduction, False, 4, 0, dtype, wanted, "cpu")
        torch.library.opcheck(torch.ops.hybridengine.linear_cross_entropy, (*arguments, *rest))
        coming = torch.ones(6 if reduction == 0 else (), dtype=native.accumulator_dtype(dtype))
        backward = torch.ops.hybridengine.linear_cross_entropy_backward
        torch.library.opcheck(backward, (coming, None, *arguments, *rest))
