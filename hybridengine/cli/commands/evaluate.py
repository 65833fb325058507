"""`hybridengine evaluate`: metrics of a run's best model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridengine.cli import console
from hybridengine.cli.result import show_metrics
from hybridengine.cli.runs import config_of

__all__ = ["run"]


def run(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|CONFIG", help="Run folder or YAML config.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. data.test=other.jsonl.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate the best model of a run.

    On the validation and test rows of its config, which overrides may replace.
    """
    from hybridengine.engine import Engine

    config, own = config_of(target)
    metrics = Engine(str(config), [*own, *(overrides or [])]).evaluate()
    if as_json:
        console.print_json(metrics)
    else:
        show_metrics(metrics)
