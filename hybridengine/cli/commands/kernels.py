"""`hybridengine kernels`: which implementation of each operation runs here, and why not another."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridengine.cli import console

__all__ = ["run"]


def run(as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False) -> None:
    """Show which kernels run here, and why.

    Every implementation of every operation: is it available, is it the default, why not.
    HYBRIDENGINE_IMPL=cross_entropy=reference,perturb=cpu forces implementations.
    """
    from hybridengine.kernels import explain, native

    rows = explain()
    if as_json:
        console.print_json([row._asdict() for row in rows])
        return
    shown = [
        (row.op, row.impl, "yes" if row.available else "no", "default" if row.chosen else "", row.reason)
        for row in rows
    ]
    console.table(("operation", "implementation", "available", "", "reason"), shown)
    if native.why_missing() is None:
        library = native.module()
        console.line(f"cpu: {library.isa()} (of {', '.join(library.supported_isas())}; HYBRIDENGINE_ISA chooses)")
