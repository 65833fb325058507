"""`hybridengine init`: a commented config to start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hybridengine.cli import console
from hybridengine.errors import ConfigError, OutputError

__all__ = ["run"]

_ASKED = {
    "task": ("task", "text-classification"),
    "model": ("pretrained model (folder or hub id)", ""),
    "data": ("training rows (file, folder or hf:NAME)", ""),
}


def run(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("config.yaml"),
    task: Annotated[str | None, typer.Option(help="Task name, e.g. text-classification.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a pretrained model.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Training rows: file, folder or hf:NAME.", show_default=False)
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Validation rows.", show_default=False)] = None,
    test: Annotated[str | None, typer.Option(help="Test rows.", show_default=False)] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method of the stack; repeat the option for more.", show_default=False)
    ] = None,
    output: Annotated[str, typer.Option(help="Folder of the run.")] = "runs/first",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a commented config.

    On a terminal it asks for what no option gives.
    """
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; choose another name or add --force to replace it")
    given = {"task": task, "model": model, "data": data}
    answers = _ask(given) if sys.stdin.isatty() else _refuse_missing(given)
    from hybridengine.cli.config_text import config_text

    _check_names(answers["task"], method or [])
    splits = {"train": answers["data"], "validation": validation, "test": test}
    text = config_text(answers["task"], answers["model"], splits, method or [], output, str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    console.line(f"wrote {path}")
    console.line(f"next: hybridengine plan {path}, then hybridengine train {path}")


def _ask(given: dict[str, str | None]) -> dict[str, str]:
    answers = {}
    for key, (question, default) in _ASKED.items():
        answers[key] = given[key] or str(typer.prompt(question, default=default or None))
    return answers


def _refuse_missing(given: dict[str, str | None]) -> dict[str, str]:
    missing = [f"--{key}" for key, value in given.items() if not value]
    if missing:
        raise ConfigError(f"init: missing {', '.join(missing)}; without a terminal to ask on, give them as options")
    return {key: str(value) for key, value in given.items()}


def _check_names(task: str, methods: list[str]) -> None:
    """Refuse names that no plugin has; every one at once."""
    from hybridengine.plugin import Catalogue

    catalogue = Catalogue()
    problems: list[str] = []
    for name, kind in [(task, "task"), *((name, "method") for name in methods)]:
        try:
            catalogue.find(name, kind=kind)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
