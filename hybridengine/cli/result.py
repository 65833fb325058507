"""What a run achieved, in a few lines made from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridengine.cli import console

__all__ = ["show_effects", "show_metrics", "show_result"]

_MOST_METRICS = 5  # the others are in summary.json and the report


def show_result(summary: Mapping[str, Any], folder: Path) -> None:
    """Print metrics, speed, what each method did, and where to look next."""
    console.line()
    show_metrics(summary.get("metrics") or {})
    if speed := summary.get("samples_per_second"):
        console.field("speed", f"{speed:,.1f} samples/s while training")
    show_effects(summary.get("methods") or {})
    console.line()
    if (folder / "best").is_dir():
        console.field("model", folder / "best")
    if (folder / "report.html").is_file():
        console.field("report", folder / "report.html")


def show_metrics(metrics: Mapping[str, Any]) -> None:
    """Print one line a split: its main metric with interval, then the others."""
    for split, values in metrics.items():
        if isinstance(values, Mapping):
            console.field(split, _metrics(values))


def _metrics(values: Mapping[str, Any]) -> str:
    from hybridengine.report.words import metric, title

    interval = values.get("ci95")
    main = values.get("main")
    names = [name for name, value in values.items() if isinstance(value, float) or name == main]
    # With one label a row, micro averages are the accuracy.
    names = [n for n in names if n == main or not n.endswith("_micro") or values[n] != values.get("accuracy")]
    words = []
    for name in sorted(names, key=lambda name: name != main)[:_MOST_METRICS]:
        text = f"{title(name).lower()} {metric(name, values[name])}"
        if name == main and isinstance(interval, list | tuple) and len(interval) == 2:
            text += f" (95% interval {metric(name, interval[0])} to {metric(name, interval[1])})"
        words.append(text)
    return ", ".join(words)


def show_effects(methods: Mapping[str, Any]) -> None:
    """Print what each method really did, as it reported."""
    rows = [(name, _effects(entry)) for name, entry in methods.items()]
    rows = [row for row in rows if row[1]]
    if rows:
        console.line()
        console.line("what each method did (mean over the run)", style="bold")
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        console.field(f"  {name}", text, width + 2)


def _effects(entry: Any) -> str:
    from hybridengine.report.words import compact

    effects = entry.get("effects", entry) if isinstance(entry, Mapping) else {}
    words = []
    for name, value in effects.items():
        mean = value.get("mean") if isinstance(value, Mapping) else value
        if isinstance(mean, int | float) and not isinstance(mean, bool):
            words.append(f"{name.replace('_', ' ')} {compact(mean)}")
    return ", ".join(words)
