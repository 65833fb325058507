"""The operations that can be measured: the files of `ops/`. Names are read without importing torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from hybridengine.errors import ConfigError, did_you_mean

__all__ = ["check_names", "load", "names", "why_missing"]

_FOLDER = Path(__file__).with_name("ops")


def names() -> list[str]:
    """Every operation that has a file."""
    return sorted(found.name for found in pkgutil.iter_modules([str(_FOLDER)]))


def check_names(wanted: Sequence[str], known: Sequence[str], kind: str) -> None:
    """Refuse names that are not known; every one at once.

    Raises:
        ConfigError: with the nearest name for each.
    """
    wrong = [name for name in wanted if name not in known]
    if wrong:
        raise ConfigError([f"bench: there is no {kind} {name!r}.{did_you_mean(name, known)}" for name in wrong])


def load(name: str) -> ModuleType:
    """Import an operation's file."""
    return importlib.import_module(f"hybridengine.bench.ops.{name}")


def why_missing(op: ModuleType) -> str | None:
    """Say why an operation cannot be measured: a file may be ahead of its kernel."""
    from hybridengine import kernels

    return None if hasattr(kernels, op.KERNEL) else f"hybridengine.kernels has no {op.KERNEL}"
