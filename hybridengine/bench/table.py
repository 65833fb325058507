"""The report as tables of text: for each operation its cases, with a column for every competitor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hybridengine.bench.case import OURS

__all__ = [
    "NOT_RUN",
    "columns",
    "digits",
    "foreign",
    "left_out",
    "legend",
    "operations",
    "setting",
    "size",
    "table",
    "times",
]

NOT_RUN = "not run"
_BUSY = 0.1


def operations(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows by operation, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault(row["op"], []).append(row)
    return found


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """The competitors of an operation that have figures in at least one case; ours first."""
    names = dict.fromkeys(name for row in rows for name in row["variants"])
    return [name for name in names if any("median_ms" in row["variants"].get(name, {}) for row in rows)]


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column names and cells: ours in milliseconds, memory, share of the floor and error; then how much others take."""
    others = [name for name in columns(rows) if name != OURS]
    heads = ["case", "ours ms", *(f"{name} takes" for name in others), "extra memory", "of torch's", "floor", "error"]
    return heads, [_line(row, others) for row in rows]


def _line(row: dict[str, Any], others: list[str]) -> list[str]:
    if "not_run" in row:
        return [row["case"], NOT_RUN, *("" for _ in others), "", "", "", ""]
    ours = row["variants"][OURS]
    return [
        row["case"],
        digits(ours["median_ms"]),
        *(times(row["variants"].get(name)) for name in others),
        size(ours["extra_bytes"]),
        _part(ours["extra_bytes"], row["variants"].get("torch", {}).get("extra_bytes")),
        f"{ours['share_of_floor']:.0%}",
        "" if ours.get("error") is None else f"{ours['error']:.1e}",
    ]


def times(figures: dict[str, Any] | None) -> str:
    """How many times as long as ours: `7.87x`, with `!` where its result is wrong."""
    if figures is None:
        return ""
    if "median_ms" not in figures:
        return NOT_RUN
    return f"{digits(figures['times_ours'])}x{'!' if figures.get('wrong') else ''}"


def left_out(report: dict[str, Any]) -> Iterator[str]:
    """One line for each competitor and reason: `not run: liger: it needs a GPU`, with the cases if not all."""
    for op, reason in report["not_run"].items():
        yield f"{NOT_RUN}: {op}: {reason}"
    cases: dict[tuple[str, str], list[str]] = {}
    everywhere: dict[str, int] = {}
    for row in report["rows"]:
        where = f"{row['op']} {row['case']}"
        if "not_run" in row:
            cases.setdefault(("", row["not_run"]), []).append(where)
        for name, figures in row["variants"].items():
            everywhere[name] = everywhere.get(name, 0) + 1
            if "not_run" in figures:
                cases.setdefault((name, figures["not_run"]), []).append(where)
    for (name, reason), found in cases.items():
        some = "" if len(found) == everywhere.get(name) else f" ({found[0]}{_more(len(found) - 1)})"
        yield f"{NOT_RUN}: {name}{': ' if name else ''}{reason}{some}"


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def size(value: float | None) -> str:
    """Bytes as `0.4 MB`, `1.2 GB`."""
    if value is None:
        return "not measured"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _part(ours: float | None, theirs: float | None) -> str:
    """Ours as a share of theirs; a share of next to nothing says nothing."""
    return f"{ours / theirs:.2f}" if ours is not None and theirs and theirs >= 1e6 else ""


def setting(report: dict[str, Any]) -> Iterator[str]:
    """What the figures depend on, in a few lines."""
    machine, floor = report["machine"], report["floor"]
    isa = f", {machine['isa']}" if machine["isa"] and machine["kind"] == "cpu" else ""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    products = "".join(
        f", {name} products {digits(rate)} GFLOP/s" for name, rate in floor["products_gflop_per_s"].items()
    )
    yield f"{machine['device']}{isa}, {machine['threads']} threads; {versions}"
    yield f"copy {digits(floor['copy_gb_per_s'])} GB/s{products}"
    huge = machine["allocator"]["THP_MEM_ALLOC_ENABLE"]
    if machine["kind"] == "cpu":
        state = "is not set" if huge is None else f"is {huge}"
        yield f"THP_MEM_ALLOC_ENABLE {state}; on CPUs it moves eager torch by up to 2.5x"


def legend(report: dict[str, Any]) -> Iterator[str]:
    """What the columns mean, and whether the machine was busy."""
    yield "takes: medians of alternating blocks, as a multiple of ours; above 1 ours is faster"
    yield f"extra memory: peak beyond inputs and results ({report['memory']})"
    yield "floor: share of the speed at which the device copies the bytes and multiplies the matrices"
    yield "error: against float64, relative, the worst of output and gradients"
    if any(figures.get("wrong") for row in report["rows"] for figures in row["variants"].values()):
        yield "!: the result is wrong by more than 5%"
    if (share := foreign(report)) is not None and share > _BUSY:
        yield f"other processes took {share:.0%} of a CPU meanwhile: figures of short computations are unreliable"


def foreign(report: dict[str, Any]) -> float | None:
    """The mean share of one CPU that other processes took."""
    shares = [row["foreign_cpu_share"] for row in report["rows"] if row.get("foreign_cpu_share") is not None]
    return sum(shares) / len(shares) if shares else None
