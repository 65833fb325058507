"""Which curves a run has: losses, metrics, learning rate, gradient norm, and the effects of its methods."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hybridengine.report.charts import COMPACT, Chart, Series, line_chart
from hybridengine.report.read import RunFolder, mapping, number, text
from hybridengine.report.words import compact, describe_effect, is_share, short_percent, title

__all__ = ["effect_charts", "training_charts"]

_MOST_LINES = 6
_MOST_EFFECTS = 24
_MOST_METRICS = 4
_NAN = float("nan")
_SIDE = re.compile("micro|precision|recall|rows")
"""Metrics that follow the others so closely that they would only crowd the chart."""


def training_charts(run: RunFolder) -> list[Chart]:
    """Loss and its terms, validation metrics, learning rate, gradient norm, speed: those that were recorded."""
    best = number(mapping(run.summary.get("best")).get("step"))
    validation = [r for r in run.evaluations if r.get("kind") == "validation"]
    metrics, shares = _metrics(run, validation)
    charts = [
        line_chart("loss", "Loss", _losses(run, validation), marker=best),
        line_chart("metrics", "Validation metrics", metrics, marker=best, show=short_percent if shares else compact),
        line_chart("lr", "Learning rate", _one(run, "learning rate", "lr", noisy=False), marker=best),
        line_chart("norm", "Gradient norm, before clipping", _one(run, "gradient norm", "gradient_norm"), marker=best),
    ]
    return [chart for chart in charts if chart]


def effect_charts(run: RunFolder) -> list[Chart]:
    """One small chart for each effect of each method."""
    names: dict[tuple[str, str], None] = {}
    for record in run.train:
        for method, effects in mapping(record.get("effects")).items():
            names.update({(method, effect): None for effect in mapping(effects)})
    charts = []
    for index, (method, effect) in enumerate(list(names)[:_MOST_EFFECTS]):
        points = _points(run.train, "effects", method, effect)
        heading = f"{method}: {describe_effect(effect)}"
        charts.append(line_chart(f"effect{index}", heading, [Series(effect, points, noisy=True)], frame=COMPACT))
    return [chart for chart in charts if chart]


def _losses(run: RunFolder, validation: list[dict[str, Any]]) -> list[Series]:
    """The total, its terms where there are several, and the loss on validation."""
    terms: dict[str, None] = {}
    for record in run.train:
        terms.update(dict.fromkeys(mapping(record.get("terms"))))
    lines = _one(run, "total" if len(terms) > 1 else "training loss", "loss")
    if len(terms) > 1:
        for name in list(terms)[: _MOST_LINES - 2]:
            lines.append(Series(name, _points(run.train, "terms", name), noisy=True))
    lines.append(Series("validation loss", _points(validation, "metrics", "loss"), True))
    return lines


def _metrics(run: RunFolder, validation: list[dict[str, Any]]) -> tuple[list[Series], bool]:
    """The main metric and a few beside it, all of one scale; and whether that scale is shares of 1."""
    names = dict.fromkeys(
        name for r in validation for name, value in mapping(r.get("metrics")).items() if number(value) is not None
    )
    main = text(mapping(run.summary.get("best")).get("metric"))
    shares = is_share(main) if main in names else any(map(is_share, names))
    alike = [name for name in names if is_share(name) == shares and name != "loss" and not _SIDE.search(name)]
    chosen = list(dict.fromkeys([name for name in (main,) if name in names] + alike))
    chosen = chosen[: _MOST_METRICS if shares else 1]
    return [Series(title(name), _points(validation, "metrics", name), True) for name in chosen], shares


def _one(run: RunFolder, name: str, key: str, noisy: bool = True) -> list[Series]:
    return [Series(name, _points(run.train, key), noisy=noisy)]


def _points(records: Iterable[dict[str, Any]], *path: str) -> list[tuple[float, float]]:
    """Step and value in order of steps; of a step logged twice, as after a resume, the later record counts."""
    found: dict[float, float] = {}
    for record in records:
        value: Any = record
        step = number(record.get("step"))
        for key in path:
            value = mapping(value).get(key)
        if step is not None and isinstance(value, int | float):
            known = number(value)
            found[step] = _NAN if known is None else known
    return sorted(found.items())
