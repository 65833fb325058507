"""The engine's torch operators (`torch.ops.hybridengine.*`) and a typed way to register them.

An operator of `Library.define` costs 1.6 microseconds a call, one of `torch.library.custom_op` ten. `register_autograd`
breaks torch.func: derivatives are `torch.autograd.Function`s around the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["apply", "define", "implement"]

NAMESPACE = "hybridengine"

# Kept for the life of the process: a library that dies takes its operators with it.
_make_library: Any = torch.library.Library
_library = _make_library(NAMESPACE, "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define an operator; `fake` returns empty outputs of the right shape and dtype, for tracing."""
    _library.define(schema)
    register: Any = torch.library.register_fake
    register(f"{NAMESPACE}::{schema.partition('(')[0]}", fake, lib=_library)


def implement(name: str, device: str, kernel: Callable[..., Any]) -> None:
    """Register what runs the operator `name` on tensors of `device` ("CPU", "CUDA")."""
    _library.impl(name, kernel, device)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call an autograd function; torch leaves `Function.apply` untyped."""
    call: Any = function
    return call.apply(*arguments)
