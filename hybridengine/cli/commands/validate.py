"""`hybridengine validate`: everything that can be found wrong without training."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridengine.cli import console

__all__ = ["run"]


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. train.lr=1e-5 train.epochs=2.", show_default=False),
    ] = None,
) -> None:
    """Check config, stack, model and data.

    Trains and writes nothing; tells every problem of the config at once.
    """
    from hybridengine.config import read_source

    read_source(config)  # what is wrong with the file is told before torch is imported
    from hybridengine.engine import Engine

    engine = Engine(config, overrides or [])
    for text in engine.validate():
        console.line(text)
    console.line(f"{config} is valid", style="green")
