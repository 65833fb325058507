"""The compiled library, or the reason why there is none.

The library is built without torch and takes addresses and shapes; the callers here check dtypes and layouts first.
"""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any, Protocol, cast

import torch  # before the library: it looks up torch's thread pool in the loaded process
from torch import Tensor

from hybridengine.errors import KernelUnavailable

__all__ = [
    "ELEMENT_TYPES",
    "NativeModule",
    "accumulator_dtype",
    "empty",
    "has_tiles",
    "module",
    "set_isa",
    "why_missing",
]

# The numbers of `ElementType` in csrc/common/element.h.
ELEMENT_TYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

# A smaller tensor comes from torch's allocator: the pool hands out whole huge pages.
_SMALLEST_POOLED_BYTES = 1 << 20


class NativeModule(Protocol):
    """What `csrc/module.cpp` exports. Addresses are ints, 0 meaning none."""

    def cross_entropy(
        self,
        logits: tuple[int, int, int, int, int],
        targets: tuple[int, int, int, int],
        shape: tuple[float, float, float, float, float, float],
        gradient: int,
        gradient_stride: int,
        by_loss: int,
        by_loss_stride: int,
        by_lse: int,
        loss: int,
        lse: int,
        /,
    ) -> None: ...

    def label_totals(
        self, element: int, target: int, weight: int, rows: int, classes: int, ignore_index: int, /
    ) -> tuple[int, float]: ...

    def sum_in_order(self, element: int, values: int, count: int, /) -> float: ...

    def scale_rows(
        self, element: int, gradient: int, rows: int, classes: int, factor: int, factor_stride: int, /
    ) -> None: ...

    def dropout(
        self, element: int, input: int, output: int, count: int, seed: int, threshold: int, scale: float, /
    ) -> None: ...

    def embedding_gradient(
        self, element: int, gradient: int, ids: int, output: int, count: int, rows: int, width: int, padding: int, /
    ) -> None: ...

    def gelu(self, input: int, gradient: int, output: int, count: int, /) -> None: ...

    def kl_pair(
        self,
        element: int,
        first: tuple[int, int, int],
        second: tuple[int, int, int],
        mask: int,
        rows: int,
        classes: int,
        temperature: float,
        symmetric: bool,
        reduction: int,
        empty_is_zero: bool,
        loss: int,
        /,
    ) -> None: ...

    def matmul(
        self,
        a: tuple[int, int, int, int],
        b: tuple[int, int, int, int],
        rows: int,
        columns: int,
        depth: int,
        c: tuple[int, int, int],
        accumulate: bool,
        /,
    ) -> None: ...

    def total_norm(self, tensors: list[tuple[int, int, int]], /) -> float: ...

    def perturb_step(
        self,
        element: int,
        batch: int,
        sites: list[tuple[int, int, int, int, int, int]],
        step_size: float,
        epsilon: float | None,
        linf: bool,
        /,
    ) -> None: ...

    def perturb_start(
        self,
        element: int,
        batch: int,
        sites: list[tuple[int, int, int, int, int]],
        epsilon: float,
        linf: bool,
        /,
    ) -> None: ...

    def perturb_weights(
        self, tensors: list[tuple[int, int, int, int, int, int]], rule: int, rho: float, eta: float, /
    ) -> tuple[float, float, bool, bool]: ...

    def copy_all(self, tensors: list[tuple[int, int, int]], /) -> None: ...

    def ema_update(self, tensors: list[tuple[int, int, int, int, int]], rate: float, /) -> None: ...

    def isa(self) -> str: ...

    def supported_isas(self) -> list[str]: ...

    def set_isa(self, name: str, /) -> None: ...

    def has_thread_pool(self) -> bool: ...

    def tune_allocator(self) -> str: ...

    def pool_statistics(self) -> dict[str, int]: ...

    def release_pool(self) -> int: ...

    def Buffer(self, size: int, /) -> Any: ...


def _load() -> tuple[NativeModule | None, str | None]:
    try:
        loaded = cast(NativeModule, importlib.import_module("hybridengine.kernels._native"))
    except ImportError as error:
        note = Path(__file__).with_name("_native_missing.txt")
        if note.exists():
            return None, f"the native library is not built: {note.read_text(encoding='utf-8').strip()}"
        return None, f"the native library cannot be loaded: {error}"
    if requested := os.environ.get("HYBRIDENGINE_ISA"):
        try:
            loaded.set_isa(requested)
        except ValueError as error:
            raise KernelUnavailable(f"HYBRIDENGINE_ISA={requested!r}: {error}") from error
    return loaded, None


_module, _reason = _load()
# A global, not a call of the library: torch.compile guards what it reads.
_has_tiles = _module is not None and _module.isa() == "amx"
_pool_is_on = os.environ.get("HYBRIDENGINE_POOL") != "0"


def why_missing() -> str | None:
    """Return why the native library cannot be used, or None if it can."""
    return _reason


def module() -> NativeModule:
    """Return the native library.

    Raises:
        KernelUnavailable: if it is missing; the message says why.
    """
    if _module is None:
        raise KernelUnavailable(_reason or "the native library is missing")
    return _module


def has_tiles() -> bool:
    """Return whether matrices of bfloat16 are multiplied in tiles (AMX)."""
    return _has_tiles


def set_isa(name: str) -> str:
    """Make the native kernels use `baseline`, `avx2`, `avx512` or `amx`; return the name used before. For tests.

    Raises:
        KernelUnavailable: if this CPU cannot run it.
    """
    global _has_tiles
    before = module().isa()
    try:
        module().set_isa(name)
    except ValueError as error:
        raise KernelUnavailable(str(error)) from error
    _has_tiles = name == "amx"
    return before


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums and losses of `dtype` are kept in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised contiguous CPU tensor, from the pool of huge pages if it is large.

    The tensor's storage keeps the pooled buffer alive; the pages return to the pool when the last view dies. Such a
    storage cannot be resized.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if _module is None or not _pool_is_on or size < _SMALLEST_POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(_module.Buffer(size), dtype=dtype, count=count).view(shape)
