"""A model whose head returns lazy logits for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine.errors import KernelUnavailable
from hybridengine.kernels.lazy_logits.head import Head
from hybridengine.kernels.lazy_logits.operations import LazyLogits

__all__ = ["patch", "why_not_patched"]


def why_not_patched(head: nn.Module | None) -> str | None:
    """Say why a module's logits cannot be lazy."""
    if head is None:
        return "the model has no output embeddings"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a plain Linear: its logits are not x W^T + b"
    if "forward" in vars(head):
        return "somebody put a forward of their own on the head"
    if head._forward_hooks or head._forward_pre_hooks:
        return "somebody watches the head with forward hooks"
    return None


@contextlib.contextmanager
def patch(model: nn.Module, *, on_read: Callable[[], None] | None = None) -> Iterator[nn.Module]:
    """Inside, the head of `model` returns lazy logits: a loss of all positions never makes them.

        with kernels.patch(model):
            loss = model(input_ids, labels=labels).loss
        loss.backward()

    Nothing else of the model is touched, no global is swapped, and the head is itself again afterwards. For every model
    whose loss is torch's or this package's cross-entropy of its head's output, scaled, capped by a tanh or shifted by a
    bias as it may be. Whoever does anything else with the logits finds them computed as always; all that is lost is
    the saving. Under `torch.compile` the head stays as it is.

    Args:
        model: with `get_output_embeddings`, as transformers' language models have, or the head itself.
        on_read: called when logits are computed in full after all.

    Raises:
        KernelUnavailable: if the head is no plain Linear layer.
    """
    of_model: Any = model
    found = model if isinstance(model, nn.Linear) else of_model.get_output_embeddings()
    if reason := why_not_patched(found):
        raise KernelUnavailable(f"kernels.patch: {reason}")

    def forward(head: nn.Linear, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return nn.Linear.forward(head, input)
        device = input.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = torch.result_type(input, head.weight) if cast is None else cast
        return LazyLogits(Head(input, head.weight, head.bias, dtype, dtype, on_read=on_read))

    found.forward = MethodType(forward, found)  # type: ignore[method-assign]
    try:
        yield model
    finally:
        del found.forward
