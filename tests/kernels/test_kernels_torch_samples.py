"""The sample inputs with which torch tests its own cross-entropy and linear cross-entropy, in double precision."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import stated_loss
from torch import Tensor

from hybridengine import kernels
from hybridengine.kernels import native

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
common_methods: Any = pytest.importorskip("torch.testing._internal.common_methods_invocations")
common_modules: Any = pytest.importorskip("torch.testing._internal.common_modules")

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=native.why_missing() or "")
needs_linear = pytest.mark.skipif(
    not hasattr(common_methods, "sample_inputs_linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
DOUBLE = torch.float64
SAMPLES = {"device": "cpu", "dtype": DOUBLE, "requires_grad": False}
IMPLS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)
    random.seed(0)


def assert_alike(ours: Any, torchs: Any, tensors: list[Tensor]) -> None:
    """Equal values and gradients for an uneven incoming gradient; NaN where torch has NaN."""
    results = []
    for function in (ours, torchs):
        leaves = [one.detach().requires_grad_() for one in tensors]
        loss = function(*leaves)
        coming = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss, *torch.autograd.grad(loss, leaves, coming, allow_unused=True)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def check(count: int, least: int) -> None:
    assert count >= least, f"only {count} samples were drawn"


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_operator_samples(impl: str) -> None:
    count = 0
    for sample in common_methods.sample_inputs_cross_entropy(None, **SAMPLES):
        target, options = sample.args[0], sample.kwargs
        assert_alike(
            lambda x, t=target, o=options: kernels.cross_entropy(x, t, impl=impl, **o),
            lambda x, t=target, o=options: F.cross_entropy(x, t, **o),
            [sample.input],
        )
        count += 1
    check(count, 21)


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_module_samples(impl: str) -> None:
    count = 0
    for sample in common_modules.module_inputs_torch_nn_CrossEntropyLoss(None, training=True, **SAMPLES):
        options, (x, target) = sample.constructor_input.kwargs, sample.forward_input.args
        assert_alike(
            lambda x, t=target, o=options: kernels.cross_entropy(x, t, impl=impl, **o),
            lambda x, t=target, o=options: F.cross_entropy(x, t, **o),
            [x],
        )
        count += 1
    check(count, 100)


def linear(x: Tensor, weight: Tensor, target: Tensor, options: dict[str, Any], impl: str, mode: str) -> Tensor:
    """Ours with torch's names of the arguments."""
    taken = {name: options[name] for name in ("reduction", "label_smoothing") if name in options}
    if options.get("ignore_index") is not None:
        taken["ignore_index"] = options["ignore_index"]
    chosen = impl if weight.dim() == 2 else None
    extra = {"bias": options.get("linear_bias"), "class_weight": options.get("weight"), "mode": mode}
    return kernels.linear_cross_entropy(x, weight, target, impl=chosen, chunk_rows=2, **taken, **extra)


def plain(x: Tensor, weight: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """Torch's specification of it."""
    logits = F.linear(x, weight.flatten(0, -2)).unflatten(-1, weight.shape[:-1])
    logits = logits if options.get("linear_bias") is None else logits + options["linear_bias"]
    names = ("reduction", "label_smoothing", "weight", "ignore_index")
    return F.cross_entropy(logits, target, **{n: options[n] for n in names if options.get(n) is not None})


def linear_samples() -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    for chunks in ({}, {"chunked": True}, {"chunked": True, "chunked_none": True}):
        for sample in common_methods.sample_inputs_linear_cross_entropy(None, **SAMPLES, **chunks):
            yield sample.input, *sample.args, sample.kwargs


@needs_linear
@pytest.mark.parametrize(("impl", "mode"), [("cpu", "auto"), ("cpu", "low_memory"), ("reference", "auto")])
def test_linear_cross_entropy_operator_samples(impl: str, mode: str) -> None:
    count = 0
    for x, weight, target, options in linear_samples():
        assert_alike(
            lambda x, w, t=target, o=options: linear(x, w, t, o, impl, mode),
            lambda x, w, t=target, o=options: plain(x, w, t, o),
            [x, weight],
        )
        count += 1
    check(count, 250)


@needs_linear
@pytest.mark.parametrize(("impl", "mode"), [("cpu", "auto"), ("cpu", "low_memory"), ("reference", "auto")])
def test_linear_cross_entropy_module_samples(impl: str, mode: str) -> None:
    count = 0
    for sample in common_modules.module_inputs_torch_nn_LinearCrossEntropyLoss(None, training=True, **SAMPLES):
        (features, classes), options = sample.constructor_input.args, dict(sample.constructor_input.kwargs)
        x, target = sample.forward_input.args
        shape = (classes, *options.get("out_features", ()))
        weight = torch.randn(*shape, features, dtype=DOUBLE)
        options["linear_bias"] = torch.randn(shape, dtype=DOUBLE) if options.get("bias") else None
        assert_alike(
            lambda x, w, t=target, o=options: linear(x, w, t, o, impl, mode),
            lambda x, w, t=target, o=options: plain(x, w, t, o),
            [x, weight],
        )
        count += 1
    check(count, 800)


# Liger's shapes, batch x length x classes, all options at once, with an eighth and a third of the length, so that they
# take hundreds of megabytes instead of gigabytes; the short ones take the same paths.
SIZES = [(2, 128, 3200), (3, 47, 3203)]
WHOLE = [(2, 256, 32000), (3, 141, 32000)]
OPTIONS: list[dict[str, Any]] = [
    {"z_loss": z_loss, "softcap": softcap, "label_smoothing": smoothing}
    for z_loss, softcap, smoothing in itertools.product((0.0, 1e-4), (None, 30.0), (0.0, 0.1))
]


@pytest.mark.parametrize("size", [*SIZES, *(pytest.param(one, marks=pytest.mark.slow) for one in WHOLE)])
def test_published_grid_of_options(size: tuple[int, int, int]) -> None:
    """In float32, not further from float64 than twice plain torch, beyond the published tolerance."""
    batch, length, classes = size
    logits, target = torch.randn(batch * length, classes) * 2, torch.randint(0, classes, (batch * length,))
    target[torch.randperm(len(target))[: len(target) // 3]] = -100
    for options in OPTIONS:
        ours, plain, exact = (
            outcome(function, logits.to(dtype), target, options)
            for function, dtype in (
                (partial(kernels.cross_entropy, impl="cpu"), torch.float32),
                (lambda x, t, **o: stated_loss(x, t, **o)[0], torch.float32),
                (lambda x, t, **o: stated_loss(x, t, **o)[0], torch.float64),
            )
        )
        for got, torchs, right, size_of in zip(ours, plain, exact, (1.0, 0.0), strict=True):
            error, its = (float((one.double() - right).abs().max()) for one in (got, torchs))
            assert error <= 2 * its + 1e-8 + 1e-6 * size_of * float(right.abs().max())


def outcome(function: Any, logits: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, target, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]
