"""`keep` on the CPU by the native library: `csrc/keep/`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hybridengine.kernels import native
from hybridengine.kernels.dispatch import record
from hybridengine.kernels.keep.kept import Kept, mark_changed

__all__ = ["Copy", "run", "why_missing", "why_not"]

_ALIGNMENT = 64  # of each tensor's copy: a cache line, and the widest vector

why_missing = native.why_missing


def why_not(tensors: Sequence[Tensor]) -> str | None:
    """Say why these tensors cannot be kept here."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return "a tensor is not a dense one on the CPU"
        if not tensor.is_contiguous():
            return "a tensor is not contiguous"
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "it has no rule for torch.func transforms"
    return None


class Copy(NamedTuple):
    """Memory for the bits of tensors: one buffer, and for each tensor its address in it."""

    tensors: list[Tensor]
    buffer: Tensor
    addresses: list[int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Copy:
        """Take memory; nothing is copied yet."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        buffer = native.empty((sum(sizes),), torch.uint8)
        starts = accumulate(sizes[:-1], initial=buffer.data_ptr())
        return cls(list(tensors), buffer, list(starts) if sizes else [])

    def fill(self) -> None:
        """Copy the tensors' bits into the buffer."""
        pairs = zip(self.tensors, self.addresses, strict=True)
        native.module().copy_all([(address, tensor.data_ptr(), tensor.nbytes) for tensor, address in pairs])

    def restore(self) -> None:
        """Write the buffer back."""
        pairs = zip(self.tensors, self.addresses, strict=True)
        native.module().copy_all([(tensor.data_ptr(), address, tensor.nbytes) for tensor, address in pairs])
        mark_changed(self.tensors)


def run(tensors: Sequence[Tensor]) -> Kept:
    """Return what restores the tensors."""
    record("keep", "cpu")
    copy = Copy.of(tensors)
    copy.fill()
    return Kept(copy.restore)
