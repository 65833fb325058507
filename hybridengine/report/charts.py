"""Line charts as plain geometry; `charts.html.j2` draws them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hybridengine.report.words import compact

__all__ = ["COMPACT", "WIDE", "Chart", "Frame", "Series", "line_chart", "ticks"]

Point = tuple[float, float]
Scale = Callable[[float], float]

_MOST_POINTS = 240
_SMOOTH_FROM = 60
_COLOURS = 6
_LARGEST = 1e30  # what is larger has diverged: drawn as a gap, or the rest of the curve would be flat


@dataclass(frozen=True)
class Frame:
    """Size of a drawing and its margins, in SVG units."""

    width: int
    height: int
    left: int = 52
    right: int = 20
    top: int = 12
    bottom: int = 34

    @property
    def right_edge(self) -> int:
        """Where the plotted area ends."""
        return self.width - self.right

    @property
    def bottom_edge(self) -> int:
        """Where the plotted area ends."""
        return self.height - self.bottom


WIDE = Frame(460, 240)
COMPACT = Frame(300, 150, bottom=28)


@dataclass(frozen=True)
class Series:
    """Named values over steps. `dots` marks each point, for a few evaluations; `noisy` adds a running mean."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    noisy: bool = False


@dataclass(frozen=True)
class Line:
    """A drawn series: its runs of finite points, and what the legend says of it."""

    name: str
    style: int
    paths: list[str]
    faint: list[str]
    dots: list[tuple[float, float, str]]
    last: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw one chart."""

    key: str
    title: str
    description: str
    frame: Frame
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marker: Tick | None = None
    x_label: str = "step"


def line_chart(
    key: str,
    title: str,
    series: Sequence[Series],
    *,
    frame: Frame = WIDE,
    marker: float | None = None,
    show: Callable[[float | None], str] = compact,
) -> Chart | None:
    """Lay out a chart, or None where no series has a finite point.

    Args:
        key: unique word for element ids.
        title: what is shown.
        series: lines by name; values that are not finite leave a gap.
        frame: size.
        marker: step of the best checkpoint, drawn as a dashed line where it is in range.
        show: writes a value.
    """
    shown = [one for one in series if any(map(_finite, one.points))]
    if not shown:
        return None
    points = [point for one in shown for point in one.points if _finite(point)]
    x_range = _range([x for x, _ in points], padding=0.0)
    y_range = _widened(_range([y for _, y in points], padding=0.06))
    x_scale, y_scale = _scale(x_range, frame.left, frame.right_edge), _scale(y_range, frame.bottom_edge, frame.top)
    lines = [_line(index, one, x_scale, y_scale, show) for index, one in enumerate(shown)]
    return Chart(
        key,
        title,
        _describe(shown, show),
        frame,
        lines,
        [Tick(x_scale(x), compact(x)) for x in ticks(*x_range, most=4 if frame is COMPACT else 6) if x == round(x)],
        [Tick(y_scale(y), show(y)) for y in ticks(*y_range, most=4 if frame is COMPACT else 5)],
        Tick(x_scale(marker), "best") if marker is not None and x_range[0] <= marker <= x_range[1] else None,
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within a range: at least one, at most `most + 1`."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first <= most:
            break
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _scale(values: tuple[float, float], start: float, end: float) -> Callable[[float], float]:
    """Map a range of values to a range of coordinates."""
    low, size = values[0], values[1] - values[0]
    return lambda value: round(start + (value - low) / size * (end - start), 1)


def _finite(point: Point) -> bool:
    return abs(point[0]) < _LARGEST and abs(point[1]) < _LARGEST  # False for NaN too


def _range(values: Sequence[float], padding: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= max(abs(low), abs(high)) * 1e-9:
        around = max(abs(low), abs(high)) * 0.1 or 1.0
        return low - around, high + around
    space = (high - low) * padding
    return low - space, high + space


def _widened(values: tuple[float, float]) -> tuple[float, float]:
    """A range in which the four digits of the labels differ: rounding noise is drawn flat, not as a curve."""
    low, high = values
    missing = max(abs(low), abs(high)) * 5e-3 - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else values


def _line(index: int, series: Series, x: Scale, y: Scale, show: Callable[[float | None], str]) -> Line:
    points = [p for p in series.points if _finite(p)]
    dense = series.noisy and len(points) >= _SMOOTH_FROM
    raw = _segments(_thin(series.points), x, y)
    drawn = _segments(_thin(_smooth(series.points)), x, y) if dense else raw
    marked = points if series.dots or len(points) == 1 else []
    dots = [(x(a), y(b), f"step {compact(a)}: {show(b)}") for a, b in marked[:: max(1, len(marked) // _MOST_POINTS)]]
    return Line(series.name, index % _COLOURS, drawn, raw if dense else [], dots, show(points[-1][1]))


def _segments(points: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    """Runs of finite points as the `points` of a polyline."""
    runs: list[list[str]] = [[]]
    for point in points:
        if _finite(point):
            runs[-1].append(f"{x(point[0])},{y(point[1])}")
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if len(run) > 1]


def _thin(points: Sequence[Point]) -> Sequence[Point]:
    """At most `_MOST_POINTS` points that keep the lowest and highest value of every bucket, so that spikes stay."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        if not all(map(_finite, bucket)):
            bucket = [next(p for p in bucket if not _finite(p))]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(ends, key=lambda p: p[0])
    return kept


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Centred running mean over a twentieth of the run; gaps stay gaps."""
    reach = max(2, len(points) // 40)
    sums, counts = [0.0], [0]
    for point in points:
        sums.append(sums[-1] + (point[1] if _finite(point) else 0.0))
        counts.append(counts[-1] + _finite(point))
    out = []
    for index, point in enumerate(points):
        low, high = max(0, index - reach), min(len(points), index + reach + 1)
        mean = (sums[high] - sums[low]) / max(1, counts[high] - counts[low])
        out.append((point[0], mean) if _finite(point) else point)
    return out


def _describe(series: Sequence[Series], show: Callable[[float | None], str]) -> str:
    """One sentence for readers who cannot see the drawing."""
    parts = []
    for one in series:
        points = [p for p in one.points if _finite(p)]
        parts.append(
            f"{one.name} goes from {show(points[0][1])} at step {compact(points[0][0])}"
            f" to {show(points[-1][1])} at step {compact(points[-1][0])}"
        )
    return "; ".join(parts) + "."
