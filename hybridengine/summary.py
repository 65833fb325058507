"""`summary.json`: the result of a run in one place."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridengine.run import Run
from hybridengine.stack.effects import EffectLog
from hybridengine.train.checkpoint import Progress

__all__ = ["make_summary", "versions"]


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("hybridengine", "torch", "transformers", "peft", "tokenizers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def make_summary(
    run: Run,
    folder: Path,
    status: str,
    error: str,
    metrics: dict[str, Any],
    progress: Progress,
    effects: EffectLog | None,
    used: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Collect what a run did; every key is there, also for stopped and failed runs.

    Args:
        used: how often each kernel ran for it, as `kernels.used` tells.
    """
    built = run.model is not None and run._optimised is not None
    main = next((m["main"] for m in metrics.values()), None)
    return {
        "status": status,
        "error": error,
        "task": run.config.task_entry[0],
        "model": run.config.model.name,
        "output": str(folder),
        "data_source": run.card.get("source") or ", ".join(dict.fromkeys(s.source for s in run.splits.values())),
        "metrics": metrics,
        "best": {"step": progress.best_step, "metric": main, "value": progress.best_value},
        "steps": run.step,
        "seconds": round(progress.seconds, 2),
        "samples_per_second": round(progress.samples / progress.seconds, 2) if progress.seconds else None,
        "parameters": {
            "total": sum(p.numel() for p in run.model.parameters()) if built else None,
            "trainable": sum(p.numel() for p in run.may_optimise.values()) if built else None,
        },
        "methods": effects.summary() if effects is not None else {},
        "kernels": used,
        "device": str(run.device),
        "precision": {"name": run.precision.name, "reason": run.precision.reason},
        "skipped_rows": run.card.get("skipped", {}),
        "notes": run.notes,
        "stop_reason": run.stop_reason,
        "versions": versions(),
    }
