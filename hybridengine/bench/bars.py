"""Grouped bars as plain geometry; `page.html.j2` draws them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridengine.bench.table import digits

__all__ = ["Bar", "Chart", "Group", "bar_chart", "steps"]

WIDTH = 1000
_LEFT, _RIGHT, _TOP, _BOTTOM = 350, 72, 8, 30
_BAR, _GAP = 17, 16


@dataclass(frozen=True)
class Bar:
    """One competitor in one case; without a length it was not run."""

    name: str
    style: int
    y: float
    length: float | None
    text: str
    hint: str


@dataclass(frozen=True)
class Group:
    """A case and its bars."""

    label: str
    y: float
    bars: list[Bar]


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw one chart."""

    key: str
    title: str
    description: str
    width: int
    height: float
    left: int
    bottom: float
    groups: list[Group]
    ticks: list[tuple[float, str]]
    unit: float


def bar_chart(
    key: str, title: str, names: Sequence[str], cases: Sequence[tuple[str, Mapping[str, float | None]]]
) -> Chart | None:
    """Lay out speeds, each case a group with one bar for each name, or None where nothing was measured.

    Args:
        key: unique word for element ids.
        title: what is shown.
        names: competitors; the place in this list is the colour.
        cases: label, and the speed of each competitor that the case has; None was not run.
    """
    found = [value for _, values in cases for value in values.values() if value is not None]
    if not found:
        return None
    most = max(1.0, *found) * 1.02
    scale = (WIDTH - _LEFT - _RIGHT) / most
    groups, y = [], float(_TOP)
    for label, values in cases:
        bars = [
            _bar(name, names.index(name), y + place * _BAR, values[name], scale)
            for place, name in enumerate(name for name in names if name in values)
        ]
        groups.append(Group(label, round(y + len(bars) * _BAR / 2 + 4, 1), bars))
        y += len(bars) * _BAR + _GAP
    ticks = [(round(_LEFT + value * scale, 1), f"{value:g}x") for value in steps(most)]
    best, where = max((values.get(names[0]) or 0.0, label) for label, values in cases)
    description = f"{len(cases)} cases; {names[0]} at most {digits(best)} times as fast as torch, for {where}."
    unit = round(_LEFT + scale, 1)
    return Chart(key, title, description, WIDTH, y + _BOTTOM, _LEFT, y - _GAP / 2, groups, ticks, unit)


def steps(most: float, count: int = 6) -> list[float]:
    """Round numbers from 0 up to `most`: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10(most / count))
    step = next(one for one in (power, 2 * power, 5 * power, 10 * power) if most / one <= count)
    return [float(f"{place * step:.12g}") for place in range(math.floor(most / step) + 1)]


def _bar(name: str, style: int, y: float, value: float | None, scale: float) -> Bar:
    if value is None:
        return Bar(name, style, y, None, f"{name}: not run", f"{name} was not run")
    return Bar(name, style, y, round(value * scale, 1), f"{digits(value)}x", f"{name}: {digits(value)} times as fast")
