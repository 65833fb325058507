"""`hybridengine bench`: the kernels against their competitors on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridengine.cli import console
from hybridengine.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from hybridengine.bench.case import Tier

__all__ = ["run"]


_Ops = Annotated[list[str] | None, typer.Option(help="An operation; repeat for more.", show_default=False)]
_Against = Annotated[
    str | None,
    typer.Option(help="Competitors, e.g. torch,compile,low-memory,torch-lce,liger,quack,cce.", show_default=False),
]
_Quick = Annotated[bool, typer.Option("--quick", help="A few cases in half a minute, without torch.compile.")]
_Full = Annotated[bool, typer.Option("--full", help="The whole matrix of shapes that fit the memory: hours.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if any.", show_default=False)]
_Output = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Write all figures, and a page beside.", show_default=False)
]
_Page = Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the page there.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")]


def run(
    op: _Ops = None,
    against: _Against = None,
    quick: _Quick = False,
    full: _Full = False,
    device: _Device = None,
    output: _Output = None,
    html: _Page = None,
    as_json: _Json = False,
) -> None:
    """Measure the kernels' speed-up on this machine.

    Speed, memory, error and share of what the hardware can do, against plain torch and every competitor that can run
    here; about three minutes on two cores.
    """
    from hybridengine.bench import catalogue

    names = [name.strip() for name in (against or "").split(",") if name.strip()]
    if quick and full:
        raise ConfigError("bench: --quick and --full exclude each other")
    catalogue.check_names(op or [], catalogue.names(), "operation")  # told before torch is imported
    targets = _targets(output, html)
    report = _measured(op or [], names, "quick" if quick else "full" if full else "default", device, targets)
    _write(report, targets)
    if as_json:
        from hybridengine.train.files import finite

        console.print_json(finite(report))
    else:
        _show(report)
        for path in targets.values():
            console.line(f"wrote {path}")
    if report["interrupted"]:
        console.note("stopped: interrupted; the rest was not measured")
        raise typer.Exit(130)


def _targets(output: Path | None, html: Path | None) -> dict[str, Path]:
    """Where to write what; a place that cannot be written is told before minutes of measuring."""
    for path in filter(None, (output, html)):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; name a file")
    page = html or (output.with_suffix(".html") if output else None)
    targets = {kind: path for kind, path in (("json", output), ("html", page)) if path is not None}
    for path in targets.values():
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}")
    if len(set(targets.values())) < len(targets):
        raise OutputError(f"{output}: the figures and the page cannot be one file; end it in .json")
    return targets


def _measured(
    ops: list[str], against: list[str], tier: Tier, device: str | None, targets: dict[str, Path]
) -> dict[str, Any]:
    from hybridengine.bench.runner import Plan, run

    def keep(report: dict[str, Any]) -> None:
        _write(report, {kind: path for kind, path in targets.items() if kind == "json"})

    return run(Plan(ops, against, tier, device), console.note, keep)


def _write(report: dict[str, Any], targets: dict[str, Path]) -> None:
    from hybridengine.bench.page import render
    from hybridengine.train.files import write_json, write_text

    for kind, path in targets.items():
        if kind == "json":
            write_json(path, report)
        else:
            write_text(path, render(report))


def _show(report: dict[str, Any]) -> None:
    from hybridengine.bench.table import left_out, legend, operations, setting, table

    for text in setting(report):
        console.line(text)
    for op, rows in operations(report).items():
        console.line()
        console.line(op, style="bold")
        console.table(*table(rows), indent="  ")
    console.line()
    for text in (*legend(report), *left_out(report)):
        console.line(text)
