"""Who competes, and what stands in the way of each. A library is imported when its function is first called."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hybridengine.bench.case import Case, Function

__all__ = ["DISTRIBUTIONS", "FAMILIES", "compiled", "imported", "linear_cross_entropy_in_chunks", "why_not"]

FAMILIES = {
    "torch": "torch as usually written",
    "compile": "torch.compile of the same code",
    "low-memory": 'ours in mode="low_memory"',
    "torch-lce": "torch.nn.functional.linear_cross_entropy in chunks",
    "liger": "Liger-Kernel",
    "quack": "QuACK",
    "cce": "cut-cross-entropy",
}

DISTRIBUTIONS = {"liger": "liger-kernel", "quack": "quack-kernels", "cce": "cut-cross-entropy"}
_OLDEST_GPU = {"liger": (7, 0), "quack": (9, 0), "cce": (8, 0)}


def why_not(name: str, device: torch.device) -> str | None:
    """Say why a family cannot run on this machine, or None."""
    if name == "torch-lce" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no linear_cross_entropy in chunks"
    if name not in DISTRIBUTIONS:
        return None
    try:
        version(DISTRIBUTIONS[name])
    except PackageNotFoundError:
        return f"{DISTRIBUTIONS[name]} is not installed"
    if device.type != "cuda":
        return "it needs a GPU"
    if torch.cuda.get_device_capability(device) < _OLDEST_GPU[name]:
        return "it needs a GPU of compute capability {}.{} or newer".format(*_OLDEST_GPU[name])
    return None


def imported(module: str, name: str) -> Function:
    """A function of another library, imported at its first call."""
    found: list[Function] = []

    def call(*args: Any, **options: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(module), name))
        return found[0](*args, **options)

    return call


def compiled(case: Case) -> Function:
    """`torch.compile` of the eager competitor, for the case's own shape."""
    result: Function = torch.compile(case.functions["torch"], dynamic=False)
    return result


def linear_cross_entropy_in_chunks(rows: int | None) -> Function:
    """Torch's own `linear_cross_entropy` in chunks of so many rows, or of its own choice."""

    def call(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return functional.linear_cross_entropy(x, weight, target, linear_bias=bias, options=options)

    return call
