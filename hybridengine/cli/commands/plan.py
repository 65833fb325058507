"""`hybridengine plan`: what a step will do and cost."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridengine.cli import console
from hybridengine.cli.outline import show_plan
from hybridengine.cli.suggestion import show_suggestion, suggestion_dict

__all__ = ["run"]


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. train.lr=1e-5 train.epochs=2.", show_default=False),
    ] = None,
    suggest: Annotated[bool, typer.Option("--suggest", help="Propose methods to add, with reasons.")] = False,
    budget: Annotated[
        float, typer.Option("--budget", min=1, help="With --suggest: what a step may cost, in plain steps.")
    ] = 2.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what a training step does and costs.

    The composed methods, passes of each phase, cost, memory and kernels; trains and writes nothing.
    With stages, one plan for each; as JSON, a list under `stages`.
    With --suggest, the methods that rows, model, memory and budget speak for.
    """
    from hybridengine.config import read_source

    read_source(config)  # what is wrong with the file is told before torch is imported
    if suggest:
        from hybridengine.suggest import suggest as propose

        proposed = propose(config, overrides or [], budget)
        console.print_json(suggestion_dict(proposed)) if as_json else show_suggestion(proposed)
        return
    from hybridengine.engine import Engine
    from hybridengine.kernels import explain

    plans = Engine(config, overrides or []).plans()
    for plan in plans:
        plan.kernels = plan.kernels or [row._asdict() for row in explain() if row.chosen]
    if as_json:
        console.print_json(plans[0].to_dict() if len(plans) == 1 else {"stages": [plan.to_dict() for plan in plans]})
        return
    for number, plan in enumerate(plans, 1):
        if len(plans) > 1:
            console.line(f"{chr(10) if number > 1 else ''}stage {number} of {len(plans)}", style="bold")
        show_plan(plan)
