"""`hybridengine plugins`: what is installed, and what each plugin is."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import typer

from hybridengine.cli import console

__all__ = ["app"]

app = typer.Typer(help="List installed plugins, or explain one.", rich_markup_mode=None, no_args_is_help=True)


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    import_all: Annotated[
        bool,
        typer.Option("--import", help="Also import plugins of other distributions, to tell their family and hooks."),
    ] = False,
) -> None:
    """List every installed plugin, by family.

    Tells what each does and what a step costs.
    Other distributions are read from their metadata, not imported.
    """
    from hybridengine.cli.catalogued import OWN, overview
    from hybridengine.plugin import Catalogue

    rows = [overview(listing, import_all) for listing in Catalogue().all()]
    if as_json:
        console.print_json(rows)
        return
    rows.sort(key=lambda row: (_title(row, own=OWN), row["name"]))
    for number, (title, group) in enumerate(itertools.groupby(rows, lambda row: _title(row, own=OWN))):
        console.line(("\n" if number else "") + title, style="bold")
        console.table(("name", "what it does", "cost"), [(row["name"], *_about(row)) for row in group], indent="  ")
    if any(row["kind"] is None and row["error"] is None for row in rows):
        console.note("plugins of other distributions were not imported; --import or `plugins info NAME` tells more")


def _title(row: dict[str, Any], own: str) -> str:
    """`adversarial methods`; plugins of others stand apart, under their distribution."""
    kinds = {None: "not imported", "method": f"{row['family']} methods", "task": "tasks", "data": "data sources"}
    return kinds[row["kind"]] + ("" if row["distribution"] == own else f" of {row['distribution']} {row['version']}")


def _about(row: dict[str, Any]) -> tuple[str, str]:
    return (f"cannot be used: {row['error']}" if row["error"] else row["summary"] or ""), row["cost"] or ""


@app.command("info")
def info(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Plugin name, or distribution:name.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Explain one plugin.

    Its maths, paper, parameters, hooks and cost, what it combines with, and an example.
    """
    from hybridengine.cli.catalogued import describe
    from hybridengine.plugin import Catalogue

    described = describe(Catalogue().find(name, kind="plugin"))
    if as_json:
        console.print_json(described)
    else:
        _show(described)


def _show(plugin: dict[str, Any]) -> None:
    console.line(f"{plugin['name']} ({plugin['kind']}, {plugin['family']})", style="bold")
    console.line(f"{plugin['distribution']} {plugin['version']}")
    console.line()
    console.line(plugin["documentation"])
    console.line()
    for key in ("paper", "cost", "combines"):
        if plugin[key]:
            console.field(key, plugin[key])
    for key in ("hooks", "slots", "requires", "provides"):
        if plugin[key]:
            console.field(key, ", ".join(plugin[key]))
    for other, reason in plugin["conflicts"].items():
        console.field("conflicts", f"{other}: {reason}")
    console.line()
    if plugin["parameters"]:
        columns = ("parameter", "type", "default", "range", "help")
        console.table(columns, [[row[key] for key in ("name", *columns[1:])] for row in plugin["parameters"]])
    else:
        console.line("no parameters")
    console.line()
    console.line("example", style="bold")
    console.line(plugin["example"])
