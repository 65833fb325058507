"""A model whose head returns lazy logits for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hybridengine.errors import KernelUnavailable
from hybridengine.kernels.lazy_logits.head import Head
from hybridengine.kernels.lazy_logits.tensor import LazyLogits
from hybridengine.kernels.modes import forward_mode

__all__ = ["patch", "why_not_patched"]

OnRead = Callable[[], None] | None


class _Patches(threading.local):
    """The heads that are patched in this thread, innermost last; a copy or a replica of one is none of them."""

    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, OnRead]] = []


_patches = _Patches()
_lock = threading.Lock()
_users: dict[int, int] = {}
"""How many contexts of all threads hold a head, by its id."""


class _PatchedLinear(nn.Linear):
    """The class of a head while it is patched."""

    def forward(self, input: Tensor) -> Tensor:
        entered = [on_read for head, on_read in _patches.entered if head is self]
        if not entered or not _can_be_lazy(input):
            return super().forward(input)
        device = input.device.type
        cast = torch.is_autocast_enabled(device) and torch.float64 not in (input.dtype, self.weight.dtype)
        dtype = torch.get_autocast_dtype(device) if cast else torch.result_type(input, self.weight)
        return LazyLogits(Head(input, self.weight, self.bias, dtype, dtype, on_read=entered[-1]))


def _can_be_lazy(input: Tensor) -> bool:
    """Whether autograd records: without it logits are made at once, as they may be read when it does."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or forward_mode():
        return False
    return not torch._C._are_functorch_transforms_active() and not input.is_inference()


def why_not_patched(head: Any) -> str | None:
    """Say why a module's logits cannot be lazy."""
    if head is None:
        return "the model has no output embeddings"
    if type(head) not in (nn.Linear, _PatchedLinear):
        return f"the head is a {type(head).__name__}, not a plain Linear: its logits are not x W^T + b"
    if "forward" in vars(head):
        return "somebody put a forward of their own on the head"
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return "somebody watches the head with hooks"
    return None


@contextlib.contextmanager
def patch(model: nn.Module, *, on_read: OnRead = None) -> Iterator[nn.Module]:
    """Inside, the head of `model` returns lazy logits: a loss of all positions never makes them.

        with kernels.patch(model):
            loss = model(input_ids, labels=labels).loss
        loss.backward()

    Nothing else of the model is touched, no global is swapped, and the head is itself again afterwards. For every model
    whose loss is torch's or this package's cross-entropy of its head's output, scaled, capped by a tanh or shifted by a
    bias as it may be. Whoever does anything else with the logits finds them computed as always; all that is lost is
    the saving. Logits that are read after the head has changed (after the optimizer's step) raise. Where no gradient is
    recorded, under `torch.compile` and in transforms of `torch.func` the head stays as it is. With gradient
    checkpointing around the head itself, `backward` must run inside the context too.

    Args:
        model: with `get_output_embeddings`, as transformers' language models have, or the head itself.
        on_read: called when logits are computed in full after all.

    Raises:
        KernelUnavailable: if the head is no plain Linear layer, or somebody watches it.
    """
    found: Any = model if isinstance(model, nn.Linear) else getattr(model, "get_output_embeddings", lambda: None)()
    if reason := why_not_patched(found):
        raise KernelUnavailable(f"kernels.patch: {reason}")
    entry = (found, on_read)
    with _lock:
        _users[id(found)] = _users.get(id(found), 0) + 1
        found.__class__ = _PatchedLinear
    _patches.entered.append(entry)
    try:
        yield model
    finally:
        _patches.entered.remove(entry)
        with _lock:
            _users[id(found)] -= 1
            if _users[id(found)] == 0:
                del _users[id(found)]
                found.__class__ = nn.Linear
