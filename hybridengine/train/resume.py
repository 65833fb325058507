"""Where a run goes on: its own newest checkpoint, or one that the config names."""

from __future__ import annotations

from pathlib import Path

from hybridengine.folder import RunFolder
from hybridengine.plugin.calling import Hooks
from hybridengine.run import Run
from hybridengine.stack.effects import EffectLog
from hybridengine.train.checkpoint import Checkpoints, Progress

__all__ = ["resume"]


def resume(run: Run, hooks: Hooks, effects: EffectLog, folder: RunFolder, checkpoints: Checkpoints) -> Progress:
    """Restore the checkpoint that the run goes on from, if there is one, and cut the metrics after it.

    Raises:
        OutputError: the checkpoint named by `resume` is damaged, or of another model or stack.
    """
    path = _start(run, checkpoints)
    if path is None:
        folder.rewind(0)
        return Progress()
    progress = checkpoints.restore(path, run, hooks, effects)
    if not folder.best.is_dir():  # the best value so far belongs to weights that this folder does not hold
        progress.best_value, progress.best_step = None, 0
    folder.rewind(run.step)
    run.say(f"resumed from {path.name}")
    return progress


def _start(run: Run, checkpoints: Checkpoints) -> Path | None:
    """A checkpoint of another run is only where this one begins: interrupted, it goes on from its own."""
    asked = run.config.resume
    if asked in ("auto", "never"):
        return checkpoints.latest(run)
    named = Path(asked)
    going_back = named.resolve().parent == checkpoints.folder.resolve()
    return named if going_back else checkpoints.latest(run) or named
