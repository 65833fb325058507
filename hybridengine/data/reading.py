"""Rows from files: JSONL, JSON, CSV, TSV, Parquet; the first four also gzipped. UTF-8 throughout."""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

from hybridengine.errors import DataError

__all__ = ["SUFFIXES", "columns_to_rows", "read_lines", "read_rows"]

Rows = Iterator[tuple[int, dict[str, Any]]]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LONGEST_LINE = 1 << 26  # bytes; a file without line breaks must not fill the memory
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def read_rows(path: str | Path, *, quoted: bool = True) -> Rows:
    """Read a file row by row; the format follows from the suffix.

    Args:
        path: a `.jsonl`, `.json`, `.csv`, `.tsv` (each also `.gz`) or `.parquet` file, UTF-8.
        quoted: whether fields of CSV and TSV may stand in double quotes.

    Yields:
        The 1-based line (JSON and Parquet: row) and the row's columns.

    Raises:
        DataError: for anything that cannot be read, with `file:line` and a way out.
    """
    path = Path(path)
    read = _reader(path, quoted)
    empty = True
    with _readable(path):
        for number, row in read(path):
            empty = False
            yield number, row
    if empty:
        raise DataError(f"{path}: holds no rows; fill it, or name another file")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Read a text file, gzipped or not by its suffix, line by line.

    Yields:
        The 1-based line number, and the line without its end. UTF-8.

    Raises:
        DataError: for anything that cannot be read, with `file:line` and a way out.
    """
    path = Path(path)
    with _readable(path):
        for number, line in enumerate(_text_lines(path), 1):
            yield number, line.rstrip("\r\n")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong while the file is read is told with its name and a way out."""
    _check_file(path)
    try:
        yield
    except _DAMAGED as error:
        raise DataError(f"{path}: damaged gzip file ({error}); compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None


def _reader(path: Path, quoted: bool) -> Callable[[Path], Rows]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": lambda p: _read_separated(p, ",", quoted),
        ".tsv": lambda p: _read_separated(p, "\t", quoted),
        ".parquet": _read_parquet,
    }
    if suffix not in readers:
        raise DataError(f"{path}: unknown format {suffix!r}; known are {', '.join(readers)} (text formats also as .gz)")
    return readers[suffix]


def _check_file(path: Path) -> None:
    try:
        if path.is_file():
            return
        if path.exists():
            raise DataError(f"{path}: not a regular file; name a file with one of {', '.join(SUFFIXES)}")
        names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise DataError(f"{str(path)[:200]}: cannot be read ({told}); give the path of an existing file") from None
    if path.is_symlink():
        raise DataError(f"{path}: a link to {path.readlink()}, which does not exist; correct the link or the path")
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "relative paths start at the working directory"
    raise DataError(f"{path}: no such file; {hint}")


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their ends, decoded one by one, so that a bad byte is reported with its line."""
    with _open(path) as file:
        number = 0
        while raw := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(raw) > _LONGEST_LINE:
                raise DataError(f"{path}:{number}: line longer than {_LONGEST_LINE >> 20} MiB; is it one row per line?")
            if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path}:1: UTF-16 text; save it as UTF-8")
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
                raise DataError(f"{path}:{number}: not UTF-8 ({byte}); save the file as UTF-8") from None


def _parse(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise DataError(f"{where}: key {twice!r} appears twice in one object; keep one")
        return row

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        msg = error.msg.removesuffix(" at")  # "Invalid control character at"
        raise DataError(f"{where}: not valid JSON: {msg} at column {error.colno}; one object per row") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read ({error})") from None


def _read_jsonl(path: Path) -> Rows:
    for number, line in enumerate(_text_lines(path), 1):
        if not line.strip():
            continue
        row = _parse(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: expected an object such as {{"text": ...}}, got {_kind(row)}')
        yield number, row


def _read_json(path: Path) -> Rows:
    text = "".join(_text_lines(path))
    if not text.strip():
        return
    value = _parse(text, str(path))
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = columns_to_rows(value, str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects or an object of columns, got {_kind(value)}")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: expected an object such as {{"text": ...}}, got {_kind(row)}')
        yield number, row


def columns_to_rows(columns: dict[str, list[Any]], source: str) -> list[dict[str, Any]]:
    """A mapping of equally long columns as rows.

    Raises:
        DataError: if the columns differ in length.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{source}: columns of different lengths {lengths}; each row needs every column")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _read_separated(path: Path, delimiter: str, quoted: bool) -> Rows:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(_text_lines(path), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] = []
    start = 1
    with _wide_fields():
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                hint = "double a quote inside a quoted field, or set data.quoted: false if fields are never quoted"
                raise DataError(f"{path}:{start}: {error}; {hint}") from None
            if fields is None:
                return
            number, start = start, reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = _header(fields, f"{path}:{number}")
                continue
            if len(fields) != len(header):
                columns = f"{len(header)} columns {header}"
                raise DataError(
                    f"{path}:{number}: {len(fields)} fields, but the header names {columns}; quote the text"
                )
            yield number, dict(zip(header, fields, strict=True))


def _header(fields: list[str], where: str) -> list[str]:
    twice = [name for index, name in enumerate(fields) if name in fields[:index]]
    if twice:
        raise DataError(f"{where}: the header names {twice[0]!r} twice; rename one column")
    return fields


@contextlib.contextmanager
def _wide_fields() -> Iterator[None]:
    """Let csv read fields as long as a line may be; its limit of 128 KiB is a process-wide setting."""
    before = csv.field_size_limit(_LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
