"""Rows for `predict`: plain lines, JSON lines, or any data file the engine reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from hybridengine.errors import DataError

__all__ = ["Form", "read_inputs"]

Input = str | dict[str, Any]


class Form(StrEnum):
    """How lines are read."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"


def read_inputs(file: str, form: Form = Form.auto) -> Iterator[tuple[str, Input]]:
    """Rows one by one, texts or mappings, each with its `file:line`.

    Args:
        file: a path, or `-` for standard input.
        form: `auto` takes a data file by its suffix and anything else by its first line: a JSON object or a text.

    Raises:
        DataError: a missing file or a bad line, with `file:line`.
    """
    if file == "-":
        yield from _from_lines(sys.stdin.buffer, "standard input", form)
        return
    from hybridengine.data.reading import SUFFIXES, read_rows

    path = Path(file)
    if form is Form.auto and path.name.lower().removesuffix(".gz").endswith(SUFFIXES):
        yield from ((f"{path}:{number}", row) for number, row in read_rows(path))
        return
    try:
        with path.open("rb") as lines:
            yield from _from_lines(lines, str(path), form)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); give a file of texts, or - for stdin"
        ) from None


def _from_lines(stream: BinaryIO, name: str, form: Form) -> Iterator[tuple[str, Input]]:
    lines = _decoded(stream, name)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{name}: holds no rows; give one text or one JSON object a line")
    if form is Form.auto:
        form = Form.jsonl if _is_object(first[1]) else Form.text
    for number, text in chain([first], lines):
        where = f"{name}:{number}"
        yield where, _object(where, text) if form is Form.jsonl else text


def _decoded(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; blank ones are no rows."""
    for number, raw in enumerate(stream, 1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
        if text.strip():
            yield number, text


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _object(where: str, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); use --format text for plain lines") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected a JSON object such as {{"text": "..."}}, got {type(row).__name__}')
    return row
