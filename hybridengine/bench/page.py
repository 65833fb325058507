"""The report as one self-contained HTML page: no script, no remote asset."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jinja2

from hybridengine.bench.bars import Chart, bar_chart
from hybridengine.bench.case import OURS
from hybridengine.bench.competitors import FAMILIES
from hybridengine.bench.table import columns, digits, foreign, left_out, operations, size

__all__ = ["render"]

_TITLES = {
    "cross_entropy": "Cross-entropy",
    "gelu": "GELU",
    "linear_cross_entropy": "Linear cross-entropy",
    "kl_pair": "KL pair",
}


@dataclass(frozen=True)
class Line:
    """A row of the table of figures."""

    case: str
    name: str
    ours: bool
    first: bool
    cells: list[str]
    wrong: bool


@dataclass(frozen=True)
class Section:
    """An operation: its chart, its figures."""

    name: str
    title: str
    summary: str
    names: list[str]
    chart: Chart | None
    lines: list[Line]
    absent: str


def render(report: dict[str, Any]) -> str:
    """The page as one HTML string; every value is escaped."""
    sections = [_section(op, rows) for op, rows in operations(report).items()]
    machine = report["machine"]
    return _template().render(
        sections=sections,
        machine=machine,
        date=report["date"],
        headline=_headline(report["rows"]),
        facts=_facts(report),
        competitors={name: text for name, text in FAMILIES.items() if name in report["against"]},
        left_out=list(left_out(report)),
        busy=foreign(report),
        memory=report["memory"],
    )


def _section(op: str, rows: list[dict[str, Any]]) -> Section:
    names = columns(rows)
    speeds = [(row["case"], {name: _speed(row, name) for name in row["variants"]}) for row in rows]
    title = _TITLES.get(op, op.replace("_", " ").capitalize())
    ours = [value for _, values in speeds if (value := values.get(OURS)) is not None]
    average = f" on average over {_count(len(ours))}" if len(ours) > 1 else ""
    summary = f"{digits(_mean(ours))} times as fast as torch{average}" if ours else ""
    lines = [line for row in rows for line in _lines(row, names)]
    chart = bar_chart(op, f"{title}: speed relative to torch", names, speeds)
    return Section(op, title, summary, names, chart, lines, _absent(rows, names))


def _absent(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Who ran in no case of the operation, and why: one reason for each."""
    reasons = {
        name: figures["not_run"] for row in rows for name, figures in row["variants"].items() if name not in names
    }
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _lines(row: dict[str, Any], names: list[str]) -> list[Line]:
    """One line for each competitor that ran in some case of the operation."""
    if "not_run" in row:
        return [Line(row["case"], "", False, True, [row["not_run"]], False)]
    found = []
    shown = {name: figures for name, figures in row["variants"].items() if name in names}
    for place, (name, figures) in enumerate(shown.items()):
        cells = [figures["not_run"]] if "not_run" in figures else _cells(row, name, figures)
        found.append(Line(row["case"], name, name == OURS, place == 0, cells, bool(figures.get("wrong"))))
    return found


def _cells(row: dict[str, Any], name: str, figures: dict[str, Any]) -> list[str]:
    speed = _speed(row, name)
    error = figures.get("error")
    return [
        digits(figures["median_ms"]),
        f"{digits(figures['q1_ms'])} to {digits(figures['q3_ms'])}",
        "" if speed is None else f"{digits(speed)}x",
        size(figures["extra_bytes"]),
        size(figures["result_bytes"]),
        f"{figures['share_of_floor']:.1%}",
        "" if error is None else f"{error:.1e}",
    ]


def _speed(row: dict[str, Any], name: str) -> float | None:
    """How many times as fast as torch; where torch was not run, as ours."""
    figures = row["variants"].get(name, {})
    base = row["variants"].get("torch", {})
    base = base if "median_ms" in base else row["variants"][OURS]
    return base["median_ms"] / figures["median_ms"] if "median_ms" in figures else None


def _headline(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The figures at the top, good and bad: name, value, detail."""
    ratios = [
        (row["variants"]["torch"]["times_ours"], f"{row['op']} {row['case']}")
        for row in rows
        if "times_ours" in row["variants"].get("torch", {})
    ]
    if not ratios:
        return []
    best, worst = max(ratios), min(ratios)
    ours, theirs = (
        sum(row["variants"].get(name, {}).get("extra_bytes") or 0 for row in rows) for name in (OURS, "torch")
    )
    found = [
        ("Speed over torch, mean", f"{digits(_mean([ratio for ratio, _ in ratios]))}x", _count(len(ratios))),
        ("Best", f"{digits(best[0])}x", best[1]),
        ("Worst", f"{digits(worst[0])}x", worst[1]),
    ]
    if theirs:
        detail = f"{size(ours)} against {size(theirs)}, beyond inputs and results"
        found.append(("Extra memory, of torch's", f"{ours / theirs:.0%}", detail))
    return found


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    machine, floor = report["machine"], report["floor"]
    products = ", ".join(f"{name} {digits(rate)} GFLOP/s" for name, rate in floor["products_gflop_per_s"].items())
    settings = {**machine["allocator"], **machine["settings"]}
    found = [
        ("Device", machine["device"]),
        ("Threads", f"{machine['threads']} of {machine['processors']} processors"),
        ("Instruction set", machine["isa"] or machine["native_library"]),
        ("Load average", f"{machine['load_average'][0]} before, {machine['load_average_after'][0]} after"),
        ("Copy bandwidth", f"{digits(floor['copy_gb_per_s'])} GB/s"),
        ("Matrix products", products or "no case needs them"),
        ("Memory measured by", report["memory"]),
        ("Python, system", f"{machine['python']}, {machine['system']}"),
        *((name, found or "not installed") for name, found in machine["versions"].items()),
        *((name, "not set" if value is None else str(value)) for name, value in settings.items()),
    ]
    return [*found, ("CUDA", machine["cuda"])] if machine["cuda"] else found


def _mean(ratios: list[float]) -> float:
    """Of ratios the geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _count(number: int) -> str:
    return f"{number} case{'' if number == 1 else 's'}"


@functools.cache
def _template() -> jinja2.Template:
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("hybridengine", "bench"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page.html.j2")
