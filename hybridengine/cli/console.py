"""What the commands print: rich on a terminal, plain lines elsewhere; errors go to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["clean", "error", "field", "is_terminal", "line", "note", "print_json", "rich_console", "table"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LEAST_WIDTH = 20


def is_terminal() -> bool:
    """Whether stdout is a terminal that understands styles."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@cache
def rich_console() -> Console:
    """The rich console of stdout, made when first needed: the import costs a tenth of a second."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def clean(text: object) -> str:
    """The text without control characters, so that names and labels cannot steer the terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", str(text))


def line(text: object = "", style: str | None = None) -> None:
    """Print one line to stdout; the style shows on a terminal only."""
    if is_terminal():
        rich_console().print(clean(text), style=style, markup=False)
    else:
        print(clean(text), flush=True)


def field(name: str, value: object, width: int = 12) -> None:
    """Print `name  value`, further lines of the value indented below the first."""
    first, *more = str(value).split("\n")
    line(f"{name:<{width}} {first}".rstrip())
    for text in more:
        line(" " * (width + 1) + text)


def note(text: object) -> None:
    """Tell something that is no result on stderr, so that stdout can be read by programs."""
    print(clean(text), file=sys.stderr, flush=True)


def error(text: object) -> None:
    """Print each line of the text to stderr as `error: …`."""
    for problem in str(text).splitlines() or [""]:
        note(f"error: {problem}")


def print_json(value: Any) -> None:
    """Print JSON for programs: indented, UTF-8, nothing else on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "") -> None:
    """Print rows under their column names: boxed on a terminal, aligned by spaces elsewhere."""
    cells = [["" if cell is None else clean(cell) for cell in row] for row in rows]
    if is_terminal():
        _rich_table(columns, cells)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        line((indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip())


def _rich_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        last = index == len(columns) - 1
        shown.add_column(name, overflow="fold", no_wrap=not last, min_width=_LEAST_WIDTH if last else None)
    for row in cells:
        shown.add_row(*(Text(cell) for cell in row))
    rich_console().print(shown, soft_wrap=False)
