"""`hybridengine report`: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridengine.cli import console

__all__ = ["run"]


def run(folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)]) -> None:
    """Write the report of a run again.

    One HTML file that needs no network; prints its path.
    """
    from hybridengine.report import write_report

    console.line(write_report(folder))
