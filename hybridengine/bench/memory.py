"""The peak of memory that a computation needs beyond its inputs.

On a GPU the allocator counts. On a CPU the kernel does: writing 5 to /proc/self/clear_refs sets VmHWM, the high-water
mark of the resident memory, back to what is resident now, and the mark is read again afterwards. Before that, free
memory is given back (the C heap by malloc_trim, the pool of the kernels by `release_pool`), or it would be used again
without showing. The mark is exact to some hundred kB, as the kernel counts in batches, and holds what libraries keep
for themselves too. A forked child would hang: OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

import torch

from hybridengine import kernels

__all__ = ["METHODS", "available", "peak", "why_not"]

METHODS = {"cuda": "torch.cuda.max_memory_allocated", "cpu": "VmHWM after /proc/self/clear_refs"}
_REFS, _STATUS = "/proc/self/clear_refs", "/proc/self/status"


def why_not(device: torch.device) -> str | None:
    """Say why memory cannot be measured here, or None."""
    if device.type == "cuda" or os.access(_REFS, os.W_OK):
        return None
    return f"{_REFS} cannot be written here, and nothing else tells the peak of one computation"


def peak(call: Callable[[], object], clear: Callable[[], None], device: torch.device) -> int | None:
    """Return how many bytes more than before were in use at the worst moment of `call`, or None if that is not told.

    Args:
        call: a warm computation.
        clear: drops the results of the last one.
        device: where it runs.
    """
    if why_not(device):
        return None
    clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    kernels.release_pool()
    _trim()
    with open(_REFS, "w", encoding="ascii") as file:
        file.write("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def available(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries lack it
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    with open(_STATUS, encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
