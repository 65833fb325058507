"""A training process that dies at a chosen file operation, in the middle of it where it is a write."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybridengine.engine import Engine
from hybridengine.train import checkpoint

_Call = Callable[..., Any]


class CrashAt:
    """Counts file operations, notes each in a file, and kills the process at the `nth`, before it is made."""

    def __init__(self, nth: int, record: Path) -> None:
        self.nth = nth
        self.count = 0
        self.record = record

    def watched(self, name: str, real: _Call, *, path_at: int = 0, writes: bool = False) -> _Call:
        """The function, watched; a writing one leaves half a file behind when the process dies in it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.nth:
                if writes:
                    real(*args, **kwargs)
                    path = Path(args[path_at])
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            with self.record.open("a", encoding="utf-8") as file:
                print(name, args[path_at], file=file)
            return real(*args, **kwargs)

        return call


def train_dying_at(config: dict[str, Any], nth: int, record: Path) -> None:
    """Train, and die at the `nth` file operation; 0 never dies."""
    torch.set_num_threads(1)
    crash = CrashAt(nth, record)
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, crash.watched(name, getattr(os, name)))
    os.fsync = crash.watched("fsync", os.fsync)
    Path.write_text = crash.watched("write_text", Path.write_text, writes=True)  # type: ignore[method-assign]
    checkpoint.save_file = crash.watched("save_file", checkpoint.save_file, path_at=1, writes=True)
    Engine(config).train()


def train(config: dict[str, Any]) -> None:
    """Train undisturbed, in a process that others may kill."""
    torch.set_num_threads(1)
    Engine(config).train()
