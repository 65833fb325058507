"""Calls every function of the native library, at sizes around its vectors and blocks. A script for instrumented builds.

    python sanitized_exercise.py path/to/_native.so

What is wrong with memory or arithmetic ends the process by the sanitizers compiled into the library; what the functions
return is tested elsewhere. The pool is off: its buffers are pages of its own, whose ends a sanitizer does not know.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLASSES = (1, 2, 17, 64, 2047, 2049, 4100)
COUNTS = (0, 1, 7, 63, 1000, 70001)  # of elements: none, in one vector, across several, for several threads
FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def load(path: Path) -> set[str]:
    """Put this build in the place of the installed one; return a set that the names of called functions come to."""
    os.environ["HYBRIDENGINE_POOL"] = "0"
    spec = importlib.util.spec_from_file_location("hybridengine.kernels._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    called: set[str] = set()
    for name, function in inspect.getmembers(module, callable):
        if not name.startswith("_"):
            setattr(module, name, _noting(name, function, called))
    sys.modules[spec.name] = module
    return called


def _noting(name: str, function: Callable[..., Any], called: set[str]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        called.add(name)
        return function(*arguments)

    return call


def cross_entropy() -> None:
    from hybridengine import kernels

    more = {"scale": 0.7, "softcap": 5.0, "z_loss": 0.01}
    known = inspect.signature(kernels.cross_entropy).parameters
    every: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, {"reduction": "none"}]
    every += [more, more | {"label_smoothing": 0.1}] if more.keys() <= known.keys() else []
    for classes, dtype, options in itertools.product(CLASSES, FLOATS, every):
        memory = torch.randn(5, classes + 3).to(dtype)
        for logits in (memory[:, :classes], memory[:, 3:], memory[:, :classes].contiguous()):
            leaf = logits.detach().requires_grad_()
            target = torch.randint(classes, (5,))
            target[1] = -100
            loss = kernels.cross_entropy(leaf, target, impl="cpu", **options)
            loss.backward(torch.full_like(loss, 0.3))
            kernels.cross_entropy(leaf.detach(), target, impl="cpu", **options)
            if more.keys() <= known.keys():
                soft = torch.softmax(torch.randn(5, classes), -1)
                kernels.cross_entropy(leaf, soft, impl="cpu", **options).sum().backward()
    weight = torch.rand(64)
    kernels.cross_entropy(torch.randn(5, 64, requires_grad=True), torch.arange(5), weight=weight, impl="cpu").backward()
    try:
        kernels.cross_entropy(torch.randn(3, 64), torch.tensor([1, 64, 2]), impl="cpu")
    except IndexError:
        return
    raise AssertionError("a bad label was taken")


def elementwise() -> None:
    from hybridengine import kernels

    for count in COUNTS:
        x = torch.randn(count, requires_grad=True)
        kernels.gelu(x, impl="cpu").sum().backward()
        for dtype in FLOATS:
            y = torch.randn(count).to(dtype).requires_grad_()
            kernels.dropout(y, 0.3, seed=5, impl="cpu").sum().backward()
            kernels.total_norm([y.detach(), torch.randn(3).to(dtype)], impl="cpu")


def embedding() -> None:
    from hybridengine import kernels

    for dtype, (rows, width) in itertools.product((torch.float32, torch.float64), ((1, 1), (9, 17), (1000, 64))):
        weight = torch.randn(rows, width).to(dtype).requires_grad_()
        ids = torch.randint(rows, (3, 50))
        for padding in (None, 0):
            kernels.embedding(weight, ids, padding_idx=padding, impl="cpu").sum().backward()


def perturb() -> None:
    from hybridengine import kernels

    for dtype, width, norm in itertools.product(FLOATS, (1, 17, 64), ("l2", "linf")):
        delta = {"a": torch.randn(3, 5, width).to(dtype), "b": torch.randn(3, 2, 9).to(dtype)}
        gradient = {site: torch.randn_like(one) for site, one in delta.items()}
        mask = {site: torch.rand(one.shape[:2]) > 0.3 for site, one in delta.items()}
        for epsilon, per in itertools.product((None, 0.5), ("sequence", "token")):
            sizes = {"step_size": 1.0, "epsilon": epsilon, "norm": norm, "per": per}
            kernels.perturb_step(delta, gradient, mask, impl="cpu", **sizes)
        uniform = {site: torch.rand(one.shape).to(one.dtype) for site, one in delta.items()}
        for per in ("sequence", "token"):
            kernels.perturb_start(uniform, mask, epsilon=0.3, norm=norm, per=per, impl="cpu")


def divergence() -> None:
    from hybridengine import kernels

    for classes, dtype, direction in itertools.product((*CLASSES, 127, 129), FLOATS, ("symmetric", "forward")):
        memory = torch.randn(2, 5, classes + 3).to(dtype)
        for columns in (slice(0, classes), slice(3, None)):
            a, b = (one[:, columns].detach().requires_grad_() for one in memory)
            for mask in (None, torch.tensor([True, False, True, True, False])):
                kernels.kl_pair(a, b, mask=mask, direction=direction, impl="cpu").backward()
                kernels.kl_pair(a, b.detach(), mask=mask, direction=direction, reduction="none", impl="cpu")


def many_tensors() -> None:
    from hybridengine import kernels

    for dtype in FLOATS:
        weights, gradients = ([torch.randn(count).to(dtype) for count in COUNTS] for _ in range(2))
        for rule in ("sam", "asam", "awp"):
            with kernels.perturb_weights(weights, gradients, rho=0.05, rule=rule, impl="cpu") as moved:
                moved.distance()
        with kernels.keep(weights, impl="cpu"):
            torch._foreach_add_(weights, gradients)
    for dtype in (torch.float32, torch.float64):
        averages, weights = ([torch.randn(count).to(dtype) for count in COUNTS] for _ in range(2))
        kernels.ema_update(averages, weights, rate=0.1, impl="cpu")


def products() -> None:
    from hybridengine.kernels import native
    from hybridengine.kernels.linear_cross_entropy.amx import matmul

    for rows, columns, depth in ((1, 1, 1), (33, 70, 31), (70, 1100, 520), (40, 1030, 1100), (1, 5, 4000)):
        for dtype in (torch.float32, torch.bfloat16):
            for a in (torch.randn(rows, depth).to(dtype), torch.randn(depth, rows).to(dtype).t()):
                for b in (torch.randn(depth, columns).bfloat16(), torch.randn(columns, depth).bfloat16().t()):
                    with contextlib.nullcontext() if native.has_tiles() else contextlib.suppress(ValueError):
                        matmul(a, b, torch.zeros(rows, columns), accumulate=rows > 1)
                        matmul(a, b, torch.zeros(rows, columns).bfloat16())


def memory() -> None:
    from hybridengine import kernels
    from hybridengine.kernels import native

    buffer = memoryview(native.module().Buffer(1 << 21))
    buffer[0] = buffer[-1] = 1
    del buffer
    kernels.pool_report()
    kernels.release_pool()
    kernels.tune_allocator()
    native.module().has_thread_pool()


def main() -> int:
    called = load(Path(sys.argv[1]))
    from hybridengine import kernels
    from hybridengine.kernels import native

    torch.manual_seed(0)
    for isa in native.module().supported_isas():
        kernels.set_isa(isa)
        for exercise in (cross_entropy, elementwise, embedding, perturb, divergence, many_tensors, products):
            exercise()
    memory()
    everything = {name for name in dir(native.module()) if not name.startswith("_")}
    assert called >= everything, f"never called: {sorted(everything - called)}"
    print(f"{len(called)} functions, no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
