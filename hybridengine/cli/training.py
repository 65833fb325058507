"""Train under the command line's care: signals, allocator, progress, result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridengine.cli.progress import TrainingProgress
from hybridengine.cli.result import show_result
from hybridengine.cli.signals import StopRequest
from hybridengine.errors import Stopped

__all__ = ["train_and_show"]


def train_and_show(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a config, show progress and result, and return the summary.

    Raises:
        Stopped: after a signal, with its exit code; a checkpoint was written.
    """
    from hybridengine.config import read_source

    read_source(config)  # what is wrong with the file is told before torch is imported
    with StopRequest() as stop, TrainingProgress() as progress:
        from hybridengine import kernels
        from hybridengine.engine import Engine

        kernels.tune_allocator()
        engine = Engine(config, overrides, progress=progress, cancel=stop)
        try:
            summary = engine.train()
        except Stopped as error:
            if stop():
                error.exit_code = stop.exit_code
            raise
    show_result(summary, Path(engine.folder))
    return summary
