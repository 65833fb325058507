"""`hybridengine plan`: what a step will do and cost."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridengine.cli import console
from hybridengine.cli.outline import show_plan

__all__ = ["run"]


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. train.lr=1e-5 train.epochs=2.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a training step does and costs.

    The composed methods, passes of each phase, cost, memory and kernels; trains and writes nothing.
    """
    from hybridengine.engine import Engine
    from hybridengine.kernels import explain

    plan = Engine(config, overrides or []).plan()
    plan.kernels = plan.kernels or [row._asdict() for row in explain() if row.chosen]
    if as_json:
        console.print_json(plan.to_dict())
    else:
        show_plan(plan)
