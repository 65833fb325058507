"""Memory of the process: the C allocator's settings and the pool of large buffers.

On a CPU much of the time of a training step is the operating system zeroing fresh pages. Nothing here happens by
itself: an application that embeds the engine decides about its own process.
"""

from __future__ import annotations

from typing import NamedTuple

from hybridengine.kernels import native

__all__ = ["AllocatorReport", "PoolReport", "pool_report", "release_pool", "tune_allocator"]


class AllocatorReport(NamedTuple):
    """What `tune_allocator` did."""

    changed: bool
    message: str


class PoolReport(NamedTuple):
    """Bytes of the pool: lent to living tensors, kept for reuse, and the most it keeps."""

    live_bytes: int
    idle_bytes: int
    limit_bytes: int


def tune_allocator() -> AllocatorReport:
    """Tell glibc's malloc to keep freed memory for the rest of the process: 4-20% of a CPU training step.

    Sets M_TRIM_THRESHOLD (never give memory back), M_TOP_PAD (grow by 256 MiB) and M_MMAP_MAX (no private mappings,
    which are unmapped on free). The process's resident memory stays at its peak; this cannot be undone.
    """
    if reason := native.why_missing():
        return AllocatorReport(False, reason)
    if reason := native.module().tune_allocator():
        return AllocatorReport(False, reason)
    return AllocatorReport(True, "malloc keeps freed pages (M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX)")


def pool_report() -> PoolReport:
    """Return the state of the pool; all zero without the native library."""
    if native.why_missing():
        return PoolReport(0, 0, 0)
    return PoolReport(**native.module().pool_statistics())


def release_pool() -> int:
    """Give the pool's idle memory back to the operating system; return how many bytes that was."""
    return 0 if native.why_missing() else native.module().release_pool()
