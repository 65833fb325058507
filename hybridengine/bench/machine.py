"""Where the numbers come from: device, versions, threads, load and settings of the memory."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hybridengine import kernels
from hybridengine.bench.competitors import DISTRIBUTIONS
from hybridengine.kernels import native

__all__ = ["describe", "load_average"]

_MEMORY_SETTINGS = ("THP_MEM_ALLOC_ENABLE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "LD_PRELOAD")
_OTHER_SETTINGS = ("HYBRIDENGINE_IMPL", "HYBRIDENGINE_ISA", "HYBRIDENGINE_POOL", "OMP_NUM_THREADS")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers, or to make them again."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "kind": device.type,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if gpu else None,
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.module().isa() if native.why_missing() is None else None,
        "native_library": native.why_missing() or "loaded",
        "load_average": load_average(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": _versions(),
        "cuda": torch.version.cuda,
        "allocator": _allocator(),
        "settings": {name: os.environ[name] for name in _OTHER_SETTINGS if name in os.environ},
    }


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes."""
    return [round(one, 2) for one in os.getloadavg()]


def _allocator() -> dict[str, Any]:
    """Fresh pages cost a CPU much of its time, so these settings move every number."""
    return {
        **{name: os.environ.get(name) for name in _MEMORY_SETTINGS},
        "transparent_huge_pages": _HUGE_PAGES.read_text(encoding="ascii").strip() if _HUGE_PAGES.exists() else None,
        "pool_limit_bytes": kernels.pool_report().limit_bytes,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": torch.__version__}
    for name in ("hybridengine", "triton", *DISTRIBUTIONS.values()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
