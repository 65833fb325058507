"""`hybridengine predict`: texts in, JSON lines out."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from hybridengine.cli.inputs import Form, read_inputs
from hybridengine.cli.runs import run_folder
from hybridengine.errors import DataError

__all__ = ["run"]

_INPUT = re.compile(r"input:(\d+): ")
_BATCHES = 8  # per call of the predictor, which sorts its rows by length


def run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    file: Annotated[
        str, typer.Argument(metavar="FILE|-", help="Rows to predict; - is standard input.", show_default=False)
    ] = "-",
    form: Annotated[
        Form,
        typer.Option(
            "--format", help="text: one text a line; jsonl: one object a line; auto: by suffix or first line."
        ),
    ] = Form.auto,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 64,
) -> None:
    """Predict rows with the best model of a run.

    Standard output gets one JSON object a row, in order, and nothing else. Blank lines are no rows.
    """
    from hybridengine import load

    folder = run_folder(folder)
    rows = read_inputs(file, form)
    chunk = list(islice(rows, batch_size * _BATCHES))  # a wrong file is told before the model is loaded
    predictor = load(folder)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    while chunk:
        places = [place for place, _ in chunk]
        with _located(places):
            for answer in predictor.predict([row for _, row in chunk], batch_size=batch_size):
                print(_as_json(answer))
        sys.stdout.flush()
        chunk = list(islice(rows, batch_size * _BATCHES))


@contextmanager
def _located(places: Sequence[str]) -> Iterator[None]:
    """The predictor counts the rows it was given (`input:3: ...`); the user knows lines of a file."""
    try:
        yield
    except DataError as error:
        found = _INPUT.match(str(error))
        if found is None or not 0 < int(found[1]) <= len(places):
            raise
        raise DataError(f"{places[int(found[1]) - 1]}: {str(error)[found.end() :]}") from error


def _as_json(answer: Any) -> str:
    text = json.dumps(answer, ensure_ascii=False)
    # Lone surrogates have no UTF-8 form, only a JSON escape.
    return text if text.isascii() or _encodable(text) else json.dumps(answer)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
