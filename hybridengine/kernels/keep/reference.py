"""The specification of `keep`, in plain torch: clones, and a copy back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridengine.kernels.dispatch import record
from hybridengine.kernels.keep.kept import Kept

__all__ = ["run"]


@torch.no_grad()
def run(tensors: Sequence[Tensor]) -> Kept:
    """Return what restores the tensors."""
    record("keep", "reference")
    saved = [tensor.clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        if saved:
            torch._foreach_copy_(list(tensors), saved)

    return Kept(restore)
