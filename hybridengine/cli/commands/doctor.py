"""`hybridengine doctor`: what this machine offers, what is missing, and what works nevertheless."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridengine.cli import console

__all__ = ["run"]

_MARKS = {"ok": "ok", "missing": "--", "broken": "!!"}


def run(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check the installation.

    Libraries, device, compiled kernels, plugins, disk and optional extras, and what works without them.

    Exits with 1 when something that every run needs is broken.
    """
    from hybridengine.cli.checkup import examine

    findings = examine()
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if as_json:
        console.print_json([finding._asdict() for finding in findings])
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            console.line(f"{_MARKS[finding.state]}  {finding.name:<{width}}  {finding.text}")
        console.line()
        console.line(f"broken: {', '.join(broken)}" if broken else "training, evaluation and prediction work here")
    raise typer.Exit(1 if broken else 0)
