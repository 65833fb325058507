"""The engine's torch operators (`torch.ops.hybridengine.*`): one of each name, whatever runs it.

An operator of `Library.define` costs 1.6 microseconds a call, one of `torch.library.custom_op` ten. `register_autograd`
breaks torch.func: derivatives are `torch.autograd.Function`s around the operators. The last argument of every operator
names the implementation, so that a compiled graph and a second backward run what the first call chose.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["apply", "define", "implement", "later"]

NAMESPACE = "hybridengine"

# Kept for the life of the process: a library that dies takes its operators with it.
_make_library: Any = torch.library.Library
_library = _make_library(NAMESPACE, "DEF")
_kernels: dict[str, dict[str, Callable[..., Any]]] = {}


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define an operator of CPU and CUDA tensors.

    Args:
        schema: as torch writes it; the last argument is `str impl`.
        fake: takes the arguments without `impl` and returns empty outputs of the right shape and dtype, for tracing.
    """
    name = schema.partition("(")[0]
    kernels = _kernels[name] = {}

    def route(*arguments: Any) -> Any:
        return kernels[arguments[-1]](*arguments[:-1])

    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, route, device)
    register: Any = torch.library.register_fake
    register(f"{NAMESPACE}::{name}", lambda *arguments: fake(*arguments[:-1]), lib=_library)


def implement(name: str, impl: str, kernel: Callable[..., Any]) -> None:
    """Say what runs the operator `name` as `impl`; `kernel` takes the arguments without `impl`."""
    _kernels[name][impl] = kernel


def later(module: str, function: str) -> Callable[..., Any]:
    """Return `module.function` as a callable that imports the module when first called (Triton costs a second)."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call an autograd function; torch leaves `Function.apply` untyped."""
    call: Any = function
    return call.apply(*arguments)
