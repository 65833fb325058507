"""`hybridengine train`: run a config, or go on with it."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridengine.cli.training import train_and_show

__all__ = ["run"]


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. train.lr=1e-5 train.epochs=2.", show_default=False),
    ] = None,
) -> None:
    """Train, evaluate and report; or go on.

    An unfinished run of the same config goes on from its last checkpoint; a finished one shows its result again.
    Ctrl-C or SIGTERM stops after the current step with a checkpoint; the same command goes on from there.
    """
    train_and_show(config, overrides or [])
