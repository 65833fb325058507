"""The entry point: options that every command shares, and how a command ends."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from hybridengine.cli import failures
from hybridengine.cli.commands import (
    bench,
    demo,
    doctor,
    evaluate,
    init,
    kernels,
    plan,
    plugins,
    predict,
    report,
    schema,
    train,
    validate,
)

__all__ = ["app", "main"]

# Rich costs a tenth of a second to import; help and usage errors read as well without it.
app = typer.Typer(
    name="hybridengine",
    help="Fine-tune language models with checked, composable stacks of training methods.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 130 or 143 stopped (a checkpoint was written).",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for module in (demo, init, validate, plan, train, evaluate, predict, report, kernels, bench, schema, doctor):
    app.command(module.__name__.rpartition(".")[2])(module.run)
app.add_typer(plugins.app, name="plugins")


def _print_version(asked: bool = True) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"hybridengine {version('hybridengine')}")
    except PackageNotFoundError:
        print("hybridengine (not installed, run from its source)")
    raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere in the line.")
    ] = False,
) -> None:
    """Fine-tune language models with checked, composable stacks of training methods."""


@app.command("version")
def show_version() -> None:
    """Print the version."""
    _print_version()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: in place of those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    _quiet_libraries(debug)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        # Not standalone: typer would print usage errors itself, in another form than all other errors.
        code = typer.main.get_command(app).main(args=words, prog_name="hybridengine", standalone_mode=False)
    except Exception as error:
        sys.exit(failures.report(error, debug))
    sys.exit(code or 0)


def _quiet_libraries(debug: bool) -> None:
    """Ask the libraries to keep warnings and progress bars to themselves; what matters the engine says itself."""
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
