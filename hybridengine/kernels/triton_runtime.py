"""Whether Triton kernels can run here: on a GPU, or in Triton's interpreter on the CPU for tests."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "why_missing", "why_not_on", "why_slower"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors; fixed when Triton is first imported."""


def why_missing() -> str | None:
    """Return what is absent from this machine, whatever the arguments."""
    return _why_missing()


# A traced caller is told the answer, not how it is found. `torch.compiler.assume_constant_result` sets the same, but
# imports torch._dynamo, which takes a second.
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU"
    if not INTERPRETED and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def why_not_on(*tensors: Tensor | None) -> str | None:
    """Say why Triton cannot read these tensors; None among them is left out."""
    wanted = "cpu" if INTERPRETED else "cuda"
    for tensor in tensors:
        if tensor is not None and tensor.device.type != wanted:
            return f"a tensor is on {tensor.device.type}, not on {wanted}"
    return None


def why_slower(*_: object) -> str | None:
    """Say why it is not the automatic choice: the interpreter never is."""
    return "the interpreter is for tests" if INTERPRETED else None
